"""The command line: thin commands over the programs."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.caption_options import CaptionOutputOptions, GenerationOptions, require_no_output
from launch.checkpoint_commands import checkpoint_app
from launch.data_commands import data_app
from launch.ending import run_to_its_end
from launch.eval_commands import ModelName, TrustModel, TxtMembers, eval_app
from launch.launch_command import launch
from launch.launcher import join_launcher, take_local_rank
from launch.options import grouped
from launch.plan.options import PlanOptions
from launch.pool_options import PlaceOptions
from vlm import __version__
from vlm.errors import EveryRankError
from vlm.imports import fast_imports
from vlm.terminal import one_line

if TYPE_CHECKING:
    from launch.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")
app.command()(launch)
app.add_typer(checkpoint_app, name="checkpoint")

_UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that this typer stands on
_MISSING_COMMAND = "NoArgs"
_ON_ALL_RANKS = (
    "train",
    "caption",
    "embed",
    "gap",
    "verify-gradients",
    "doctor",
    "replay",
    "eval",
    "demo",
    "data counting",
)
_PER_NODE = "launch"  # srun and others may start it once a node: they do not start the ranks then

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of one that ships.", metavar="RECIPE")]
OptionalRecipe = Annotated[
    str | None, typer.Argument(help="A recipe file, or the name of one that ships.", metavar="[RECIPE]")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value", metavar="[KEY.PATH=VALUE]...")]
TrustRecipe = Annotated[
    bool,
    typer.Option("--trust", help="Run the commands and classes that the recipe names (docs/what-is-a-program.md)."),
]


def run() -> None:
    """Run the command line; whatever ends it is one line and an exit code."""

    def command() -> None:
        _join_ranks()
        try:
            sys.exit(app(prog_name="vlm", standalone_mode=False) or 0)
        except _UsageError as error:
            if _MISSING_COMMAND in type(error).__name__:
                error.show()  # the help
                sys.exit(2)
            where = error.ctx.command_path.partition(" ")[2] if error.ctx else ""
            message = f"{where}{': ' if where else ''}{' '.join(error.format_message().split())}"
            raise EveryRankError(message) from None

    run_to_its_end(command)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"vlm {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def vlm(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Train vision-language dual encoders from webdataset shards, and measure what was trained."""


def _join_ranks() -> None:
    """Take part in what a launcher started. Raises UserError for commands that only one process can run."""
    sys.argv[1:] = take_local_rank(sys.argv[1:], os.environ)
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    command = " ".join(words[: 2 if words[:1] == ["data"] else 1])
    if command == _PER_NODE:
        return
    join_launcher()
    if command not in ("", *_ON_ALL_RANKS) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EveryRankError(f"vlm {command} runs in one process: start it without a launcher")


def _checked_recipe(name: str, overrides: list[str] | None, *, trust: bool, tell: bool = False) -> "Recipe":
    """The recipe, read before torch is imported, which takes seconds: most mistakes are told at once.

    So is what is about to be done, where that is to be told.
    """
    from launch.quick_check import quick_problem
    from launch.recipe_file import read_recipe

    path, values = read_recipe(name, overrides or (), trust=trust)
    if "torch" not in sys.modules and (problem := quick_problem(values)) is not None:
        raise EveryRankError(f"{path}: {problem}")
    if tell and os.environ.get("RANK", "0") == "0":
        from launch.first_line import first_line

        print(one_line(first_line(name, values)), flush=True)
    with fast_imports():
        from launch.recipe import check_recipe

    return check_recipe(values, str(path))


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help='"auto", or a checkpoint folder to go on from.')] = None,
    allow_changes: Annotated[
        bool,
        typer.Option("--allow-changes", help="Resume although the recipe changed; other data is refused all the same."),
    ] = False,
    trust: TrustRecipe = False,
) -> None:
    """Train a recipe. Under torchrun or accelerate launch, on all their ranks."""
    checked = _checked_recipe(recipe, overrides, trust=trust, tell=True)
    with fast_imports():
        from launch.train import REPORT
        from launch.train import train as run_recipe

    folder = run_recipe(checked, resume=resume, allow_changes=allow_changes)
    if os.environ.get("RANK", "0") == "0":
        print(f"report: {folder / REPORT}")


@app.command()
@grouped
def caption(
    model: ModelName,
    pictures: Annotated[list[str], typer.Argument(help="Image files, or shards.", metavar="IMAGES...|SHARDS...")],
    generation: GenerationOptions,
    output: CaptionOutputOptions,
    batch_size: Annotated[
        int, typer.Option(min=1, max=2**16, help="Pictures a forward; no caption depends on it.")
    ] = 64,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write a line of JSON each to this file.")
    ] = None,
    trust: TrustModel = False,
) -> None:
    """Print a caption of each picture with its log-likelihood, or write shards with them (--out). On all ranks."""
    with fast_imports():
        from launch.caption import caption_pictures, generation_config

    config = generation_config(asdict(generation))
    if output.out is None:
        require_no_output(output)
        caption_pictures(model, pictures, config, batch_size=batch_size, json_file=json_file, trust=trust)
        return
    with fast_imports():
        from launch.caption_shards import caption_shards

    caption_shards(model, pictures, config, output, batch_size=batch_size, json_file=json_file, trust=trust)


@app.command()
@grouped
def embed(  # noqa: PLR0913 - the options of the command line
    model: ModelName,
    shards: Annotated[list[str], typer.Argument(help="Shards: names, {00..03} and * patterns.", metavar="SHARDS...")],
    out: Annotated[Path, typer.Option(help="The folder for the embeddings, a Parquet file a shard.")],
    place: PlaceOptions,
    what: Annotated[str, typer.Option(help="image, text, or both; a sample needs all of it.")] = "image,text",
    texts: Annotated[str, typer.Option(help="first: of several captions the first; or all.")] = "first",
    txt: Annotated[str, typer.Option(help="A txt member is one caption (whole), or one a line (lines).")] = "whole",
    stored: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    precision: Annotated[str, typer.Option(help="Of the towers' products: fp32 or bf16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, max=2**16, help="Samples held ready; no byte depends on it.")] = 256,
    workers: Annotated[int, typer.Option(min=1, max=512, help="Threads of each rank that decode images.")] = 4,
    processes: Annotated[
        int | None, typer.Option(min=1, max=4096, help="With --on ray or slurm: processes at most.")
    ] = None,
    trust: TrustModel = False,
) -> None:
    """Write the embeddings of the samples of shards; the same command goes on after a kill. On all ranks."""
    with fast_imports():
        from launch.embed import embed_config, embed_shards

    config = embed_config(what, texts, txt, stored, precision)
    if place.on != "local":
        from launch.embed_pool import EmbedPlan, embed_on

        with place.start(processes, gpu=True) as pool:
            embed_on(pool, EmbedPlan(model, tuple(shards), config, out, batch_size, workers, trust=trust))
        return
    embed_shards(model, shards, config, out, batch_size=batch_size, workers=workers, trust=trust)


@app.command()
def gap(
    model: ModelName,
    shards: Annotated[list[str], typer.Argument(help="Shards of captioned images.", metavar="SHARDS...")],
    out: Annotated[Path, typer.Option(help="Write the statistics to this file.")],
    batch_size: Annotated[int, typer.Option(min=1, max=2**20, help="Rows a forward; no figure depends on it.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, max=10**12, help="Only the first so many samples.")] = None,
    txt: TxtMembers = None,
    trust: TrustModel = False,
) -> None:
    """Measure what a model's images and texts differ by: `statistics` of model.captioner.gap. On all ranks."""
    with fast_imports():
        from launch.gap import captioned_images, write_gap

    config = captioned_images(shards, batch_size=batch_size, limit=limit, txt=txt)
    write_gap(model, config, out, trust=trust)


@app.command()
def verify_gradients(
    recipe: RecipeName,
    overrides: Overrides = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Take these weights and this memory, not the first.")] = None,
    trust: TrustRecipe = False,
) -> None:
    """Compare one step's gradient, as this launch computes it, with one process in fp32; exit code 1 if it is off."""
    checked = _checked_recipe(recipe, overrides, trust=trust)
    with fast_imports():
        from launch.verify_gradients import verify
    from vlm.paths import local_path

    if not verify(checked, None if checkpoint is None else local_path(checkpoint, "--checkpoint")):
        raise typer.Exit(1)


@app.command(name="plan")
@grouped
def plan_run(
    where: PlanOptions,
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine, and write its figures as a file for --gpu.")
    ] = False,
    out: Annotated[Path, typer.Option(help="With --calibrate: the file.")] = Path("this-machine.yaml"),
    trust: TrustRecipe = False,
) -> None:
    """Predict memory, step time, days and cost of a run before it is queued, and what would not work there."""
    if calibrate:
        from launch.plan.calibrate import write_calibration

        write_calibration(out)
        return
    if recipe is None:
        raise EveryRankError("plan: name a RECIPE, or measure this machine with --calibrate")
    checked = _checked_recipe(recipe, overrides, trust=trust)
    from launch.plan.command import plan_recipe

    plan_recipe(checked, recipe, where)


@app.command()
def doctor(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this check; repeatable.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    trust: TrustRecipe = False,
) -> None:
    """Say what would fail on this machine, these ranks and this data; exit code 1 if something would. On all ranks."""
    checked = None if recipe is None else _checked_recipe(recipe, overrides, trust=trust)
    from launch.doctor.command import examine

    if not examine(checked, only or (), json_file):
        raise typer.Exit(1)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="The run directory.", metavar="RUN")],
    step: Annotated[int, typer.Option(min=1, max=10**12, help="The step, as the run's lines number it, from 1.")],
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all samples, and what was found, to this file.")
    ] = None,
    trust: TrustRecipe = False,
) -> None:
    """Run one step of a run again and name the first layer whose output or gradient is not finite. On all ranks."""
    from vlm.paths import local_path, output_file
    from vlm.training.run_files import RECIPE

    written = local_path(run, "RUN") / RECIPE
    if not written.is_file():
        raise EveryRankError(f"{run}: no run directory: it has no {RECIPE}")
    target = None if json_file is None else output_file(json_file, "--json")
    checked = _checked_recipe(str(written), overrides, trust=trust)
    with fast_imports():
        from launch.replay import replay as replay_step

    replay_step(checked, step, trust=trust, json_file=target)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where data and run go.", metavar="[DIR]")] = Path("runs/demo"),
) -> None:
    """Render scenes, train a small model on them, evaluate it, write the report."""
    with fast_imports():
        from launch.demo import run_demo

    run_demo(folder)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are compared.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: report.html in the first run.")] = None,
) -> None:
    """Write one self-contained HTML page on one run, or several side by side."""
    from eval.report import write_report
    from launch.shown_progress import shown_progress
    from vlm.paths import below, local_path, output_file

    runs = [local_path(one, "RUN") for one in runs]
    target = below(runs[0], "report.html", "report") if out is None else output_file(out, "--out")
    with shown_progress():
        write_report(runs, target)
    print(target)


@app.command()
def export(
    checkpoint: ModelName,
    folder: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DIR")],
    to: Annotated[str, typer.Option(help="open_clip, or your own as package.module:Class.", metavar="FORMAT")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Check the parity on the first samples of these shards, not on drawn pictures."),
    ] = None,
    before_head: Annotated[bool, typer.Option("--before-head", help="Leave out the projection heads.")] = False,
    without_decoder: Annotated[
        bool, typer.Option("--without-decoder", help="Leave out the captioning decoder.")
    ] = False,
    trust: TrustModel = False,
) -> None:
    """Write a checkpoint in another system's format and check, with that system, that it computes the same."""
    with fast_imports():
        from launch.export import export_model

    options = {"before_head": before_head, "without_decoder": without_decoder, "trust": trust}
    parity = export_model(checkpoint, to, folder, data or (), **options)
    print(f"exported to {folder}")
    print(
        f"parity with {to} in fp32: images differ by at most {parity.image:.1e} ({parity.num_images} checked), "
        f"texts by {parity.text:.1e} ({parity.num_texts} checked)"
        + ("" if parity.likelihood is None else f", log-likelihoods of tokens by {parity.likelihood:.1e}")
    )


@app.command()
def join(
    models: Annotated[
        list[str], typer.Argument(help="Runs, checkpoints or models, two or more.", metavar="RUN RUN...")
    ],
    out: Annotated[Path, typer.Option(help="The new folder for the joined checkpoint.")],
    trust: TrustModel = False,
) -> None:
    """Put trained models side by side into one checkpoint, whose similarity is the mean of their cosines."""
    with fast_imports():
        from launch.join import join_models

    joined = join_models(models, out, trust=trust)
    print(f"joined: {out} ({len(models)} models, {joined.embed_dim} dimensions)")


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from launch.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.", metavar="[RECIPE]")] = None,
) -> None:
    """List the recipes that ship, or print one: to begin your own, `vlm recipes scenes > mine.yaml`."""
    from launch.recipe_file import find_recipe, recipe_text, shipped_recipes
    from vlm.terminal import printable

    if name is not None:
        print(printable(recipe_text(find_recipe(name))), end="")
        return
    shipped = shipped_recipes()
    for title, words in shipped.items():
        print(f"{title:<{max(map(len, shipped))}}  {words}")
