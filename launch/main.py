"""The command line: thin commands over the programs."""

import json
import os
import sys
from typing import Annotated, Any

import typer

from launch.checkpoint_commands import checkpoint_app
from launch.data_commands import data_app
from launch.ending import run_to_its_end
from launch.eval_commands import eval_app
from launch.launch_command import launch
from launch.launcher import join_launcher, take_local_rank
from launch.model_commands import caption, embed, export, gap, join
from launch.run_commands import demo, doctor, plan, replay, report, train, verify_gradients
from vlm import __version__
from vlm.errors import EveryRankError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")
for command in (train, launch, plan, doctor, caption, embed, gap, verify_gradients, replay, demo, report, export, join):
    app.command()(command)
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
