"""The commands on recipes and runs: thin, with the programs behind them."""

import os
from pathlib import Path
from typing import Annotated

import typer

from launch.options import grouped
from launch.plan.options import PlanOptions
from launch.recipe_arguments import OptionalRecipe, Overrides, RecipeName, TrustRecipe, checked_recipe
from vlm.errors import EveryRankError
from vlm.imports import fast_imports


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
    checked = checked_recipe(recipe, overrides, trust=trust, tell=True)
    with fast_imports():
        from launch.train import REPORT
        from launch.train import train as run_recipe

    folder = run_recipe(checked, resume=resume, allow_changes=allow_changes)
    if os.environ.get("RANK", "0") == "0":
        print(f"report: {folder / REPORT}")


def verify_gradients(
    recipe: RecipeName,
    overrides: Overrides = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Take these weights and this memory, not the first.")] = None,
    trust: TrustRecipe = False,
) -> None:
    """Compare one step's gradient, as this launch computes it, with one process in fp32; exit code 1 if it is off."""
    checked = checked_recipe(recipe, overrides, trust=trust)
    with fast_imports():
        from launch.verify_gradients import verify
    from vlm.paths import local_path

    if not verify(checked, None if checkpoint is None else local_path(checkpoint, "--checkpoint")):
        raise typer.Exit(1)


@grouped
def plan(
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
    checked = checked_recipe(recipe, overrides, trust=trust)
    from launch.plan.command import plan_recipe

    plan_recipe(checked, recipe, where)


def doctor(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this check; repeatable.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    trust: TrustRecipe = False,
) -> None:
    """Say what would fail on this machine, these ranks and this data; exit code 1 if something would. On all ranks."""
    checked = None if recipe is None else checked_recipe(recipe, overrides, trust=trust)
    from launch.doctor.command import examine

    if not examine(checked, only or (), json_file):
        raise typer.Exit(1)


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
    checked = checked_recipe(str(written), overrides, trust=trust)
    with fast_imports():
        from launch.replay import replay as replay_step

    replay_step(checked, step, trust=trust, json_file=target)


def demo(
    folder: Annotated[Path, typer.Argument(help="Where data and run go.", metavar="[DIR]")] = Path("runs/demo"),
) -> None:
    """Render scenes, train a small model on them, evaluate it, write the report."""
    with fast_imports():
        from launch.demo import run_demo

    run_demo(folder)


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
