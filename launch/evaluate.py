"""Evaluate one model from the command line, on all ranks that a launcher started."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from eval.evaluator import Evaluator, EvaluatorConfig, build_evaluator
from eval.geometry import Geometry, GeometryEvaluationConfig, GeometryFigures
from eval.geometry_plots import PLOTS, write_plots
from eval.watching import watched_by
from launch.agreement import require_same_view
from launch.model_source import load_model
from vlm.config import Config, first_problem
from vlm.ends.ranks import Patience
from vlm.errors import UserError
from vlm.model.dual_encoder import DualEncoder
from vlm.paths import output_file, output_folder, write_output
from vlm.terminal import Terminal, one_line
from vlm.training.ledger import skips_of_all_ranks
from vlm.training.together import ranks_together
from vlm.world import World

PATIENCE = 60.0  # seconds
_SECONDS_BETWEEN = 10.0
_SHOWN = 10

Checked = TypeVar("Checked", bound=Config)


def checked_config(kind: type[Checked], /, **options: Any) -> Checked:
    """The configuration that options of a command make; None leaves the default. Raises UserError for a wrong value."""
    try:
        return kind.model_validate({name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        raise UserError(first_problem(error, kind)) from None


def shard_options(
    data: Sequence[str], batch_size: int, limit: int | None, *, before_head: bool, precision: str
) -> dict[str, Any]:
    """What the commands have in common, as `ShardEvaluation` calls it."""
    embedding = "before_head" if before_head else "after_head"
    return {
        "shards": tuple(data),
        "batch_size": batch_size,
        "limit": limit,
        "embedding": embedding,
        "precision": precision,
    }


def evaluate_model(
    name: str, config: EvaluatorConfig, json_file: Path | None, *, trust: bool = False, patience: float = PATIENCE
) -> dict[str, float]:
    """Run one evaluator on the model called `name`; print a table and, when asked, write the figures as JSON."""
    json_file = None if json_file is None else output_file(json_file, "--json")
    with _loaded(name, patience, trust=trust) as (model, world):
        evaluator = build_evaluator(config, model.image_spec, model.tokenizer, None, "--data")
        require_same_view(world, {"--data": evaluator.record})
        _tell(evaluator, world)
        with _shown_progress(world):
            figures = evaluator.run(model, world)
        _tell_skipped(evaluator, world)
        if world.is_main:
            _show(name, config.kind, figures)
            _write_json(json_file, name, config, figures)
        world.barrier()
    return figures


def evaluate_geometry(
    name: str,
    config: GeometryEvaluationConfig,
    json_file: Path | None,
    plots: Path | None,
    *,
    trust: bool = False,
    patience: float = PATIENCE,
) -> GeometryFigures:
    """The same for geometry, whose JSON holds spectra and histograms too, and which draws into the folder `plots`."""
    json_file = None if json_file is None else output_file(json_file, "--json")
    plots = None if plots is None else output_folder(plots, "--plots", parents=False, files=PLOTS)
    with _loaded(name, patience, trust=trust) as (model, world):
        geometry = Geometry(config, model.image_spec, model.tokenizer, None, "--data")
        require_same_view(world, {"--data": geometry.record})
        _tell(geometry, world)
        with _shown_progress(world):
            measured = geometry.measure(model, world)
        _tell_skipped(geometry, world)
        if world.is_main:
            _show(name, config.kind, measured.figures)
            drawn = {"spectra": measured.spectra, "scores": measured.scores}
            _write_json(json_file, name, config, {**measured.figures, **drawn})
            if plots is not None:
                for path in write_plots(measured, plots):
                    print(path)
        world.barrier()
    return measured


def _tell(evaluator: Evaluator, world: World) -> None:
    if world.is_main:
        for line in evaluator.notices:
            print(one_line(line), file=sys.stderr)


def _tell_skipped(evaluator: Evaluator, world: World) -> None:
    """Name on standard error what could not be used. Collective."""
    skips = skips_of_all_ranks(evaluator.skipped, "--data", world)
    if world.is_main:
        for skip in skips[:_SHOWN]:
            print(one_line(f"skipped: {skip.shard} {skip.key}: {skip.reason}"), file=sys.stderr)
        if len(skips) > _SHOWN:
            print(f"skipped: {len(skips) - _SHOWN:,} more; `vlm data check` names all of them", file=sys.stderr)


@contextmanager
def _shown_progress(world: World) -> Iterator[None]:
    """Say within the block how far the evaluation is: a bar on a terminal, elsewhere a line every ten seconds."""
    console = Terminal(stderr=True)
    if not world.is_main:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, TaskID] = {}
        said = time.monotonic()

        def hear(work: str, done: int, total: int) -> None:
            nonlocal said
            if work not in tasks:
                tasks[work] = bar.add_task(work, total=total)
            bar.update(tasks[work], completed=done, total=total)
            if not console.is_terminal and time.monotonic() - said >= _SECONDS_BETWEEN:
                said = time.monotonic()
                print(f"{work} {done:,}/{total:,} on each rank", file=sys.stderr)

        with watched_by(hear):
            yield


@contextmanager
def _loaded(name: str, patience: float, *, trust: bool) -> Iterator[tuple[DualEncoder, World]]:
    """The model called `name` on each of the launched ranks."""
    together = ranks_together(
        "ddp",
        rows_per_rank=1,
        precision="fp32",
        max_grad_norm=None,
        patience=Patience(patience, "--patience"),
    )
    with together as (accelerator, _):
        world = World.current(accelerator.device)
        model = load_model(name, world.device, trust=trust)
        if world.is_main:
            for line in model.notices:
                print(one_line(line), file=sys.stderr)
        yield model, world


def _write_json(file: Path | None, name: str, config: EvaluatorConfig, figures: Mapping[str, Any]) -> None:
    if file is not None:
        said = {"model": name, "evaluation": config.kind, "precision": config.precision}
        content = json.dumps({**said, **figures}, indent=2) + "\n"
        write_output(file, content, "--json")


def _show(name: str, kind: str, figures: dict[str, float]) -> None:
    table = Table(title=f"{kind} of {name}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, value in figures.items():
        table.add_row(key, f"{value:.15g}" if float(value).is_integer() else f"{value:.4f}")
    Terminal().print(table)
