"""Evaluate one model from the command line, on all ranks that a launcher started."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from data.convert.on_ranks import LeftOut
from eval.evaluator import EVALUATORS, EvaluationContext, EvaluatorConfig
from eval.recipe import AnyEvaluatorConfig, build_evaluator
from launch.agreement import require_same_view
from launch.model_source import load_model
from launch.recipe_file import apply_override
from launch.shown_progress import shown_progress
from vlm.config import first_problem
from vlm.distributed.world import World
from vlm.ends.ranks import Patience
from vlm.errors import UserError
from vlm.evaluation import Evaluator, FigureTable
from vlm.model.dual_encoder import DualEncoder
from vlm.paths import output_file, output_folder, shown, write_output
from vlm.terminal import Terminal, one_line
from vlm.training.engines.base import EngineSettings
from vlm.training.skips import skips_of_all_ranks
from vlm.training.together import ranks_together

PATIENCE = 60.0  # seconds
_OPTIONS = {"shards": "--data", "file": "--file", "images": "--images"}
_MOST_SKIPS = 10

_READER: TypeAdapter[EvaluatorConfig] = TypeAdapter(AnyEvaluatorConfig)


def evaluator_config(kind: str, keys: Sequence[str] | None = None, /, **options: Any) -> EvaluatorConfig:
    """The configuration of an evaluator, by name or `package.module:Class`, from options and from `key=value` words.

    An option that is None was not given; a word takes the place of an option.

    Raises:
        UserError: no such evaluator, an unknown key or an impossible value.
    """
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for word in keys or ():
        apply_override(values, word)
    if "kind" in values:
        raise UserError(f"kind: found {shown(values['kind'])}; the kind is the word before the model ({kind})")
    try:
        return _READER.validate_python({"kind": kind, **values})
    except ValidationError as error:
        raise UserError(first_problem(error, EvaluatorConfig)) from None


def evaluate_model(
    name: str,
    config: EvaluatorConfig,
    json_file: Path | None = None,
    plots: Path | None = None,
    *,
    trust: bool = False,
    patience: float = PATIENCE,
) -> dict[str, float]:
    """Run one evaluator on the model called `name` and print a table of its figures, which are returned.

    When asked, figures and curves are written as JSON, and what the evaluator draws into the folder `plots`.
    """
    json_file = None if json_file is None else output_file(json_file, "--json")
    plots = None if plots is None else _plots_folder(plots, config)
    config.check_files(None, lambda key: _OPTIONS.get(key, key))
    with loaded_model(name, patience, trust=trust) as (model, world):
        context = EvaluationContext(model.image_spec, model.tokenizer, options=_OPTIONS)
        evaluator = build_evaluator(config, context)
        evaluator.require(model)
        records = {_OPTIONS.get(key, key): record for key, record in evaluator.records.items()}
        require_same_view(world, records)
        _print_notices(evaluator, world)
        with shown_progress(is_main=world.is_main):
            evaluation = evaluator.run(model, world)
        _print_skipped(evaluator, world)
        if world.is_main:
            _print_table(name, config.kind, evaluation.figures)
            for table in evaluation.tables.values():
                _print_figure_table(table)
            tables = {key: asdict(table) for key, table in evaluation.tables.items()}
            _write_json(json_file, name, config, {**evaluation.figures, **evaluation.curves, **tables})
            if plots is not None and evaluation.plots is not None:
                for path in evaluation.plots.write(plots):
                    print(path)
        world.barrier()
    return evaluation.figures


def _plots_folder(plots: Path, config: EvaluatorConfig) -> Path:
    if not config.plots:
        drawing = [name for name, kind in EVALUATORS.all().items() if kind.plots]
        raise UserError(f"--plots: {config.kind} draws nothing; choose from: {', '.join(drawing)}")
    return output_folder(plots, "--plots", parents=False, files=config.plots)


def _print_notices(evaluator: Evaluator, world: World) -> None:
    if world.is_main:
        for line in evaluator.notices:
            print(one_line(line), file=sys.stderr)


def _print_skipped(evaluator: Evaluator, world: World) -> None:
    """Name on standard error what could not be used. Collective."""
    skips = skips_of_all_ranks(evaluator.skipped, "--data", world)
    if world.is_main:
        for skip in skips[:_MOST_SKIPS]:
            print(one_line(f"skipped: {skip.shard} {skip.key}: {skip.reason}"), file=sys.stderr)
        if len(skips) > _MOST_SKIPS:
            print(
                f"skipped: {len(skips) - _MOST_SKIPS:,} more; `vlm data check` names those of shards", file=sys.stderr
            )


def print_left_out(shards: Sequence[str], left_out: Sequence[tuple[int, LeftOut]], ledger: Path) -> None:
    """Name on standard error what got nothing, by the number of its shard; all of it is in the ledger."""
    for number, one in left_out[:_MOST_SKIPS]:
        words = f"{shards[number]} {one.key}".rstrip()
        print(one_line(f"skipped: {words}: {one.reason}"), file=sys.stderr)
    if len(left_out) > _MOST_SKIPS:
        print(f"skipped: {len(left_out) - _MOST_SKIPS:,} more; {ledger} names all of them", file=sys.stderr)


@contextmanager
def loaded_model(name: str, patience: float, *, trust: bool) -> Iterator[tuple[DualEncoder, World]]:
    """The model called `name` on each of the launched ranks."""
    together = ranks_together(EngineSettings("ddp", rows_per_rank=1), patience=Patience(patience, "--patience"))
    with together as (accelerator, _):
        world = World.current(accelerator.device)
        model = load_model(name, world.device, trust=trust)
        if world.is_main:
            for line in model.notices:
                print(one_line(line), file=sys.stderr)
        yield model, world


def _write_json(file: Path | None, name: str, config: EvaluatorConfig, results: Mapping[str, Any]) -> None:
    if file is not None:
        precision = config.model_dump(mode="json", include={"precision"})  # nothing where there is no such key
        content = json.dumps({"model": name, "evaluation": config.kind, **precision, **results}, indent=2) + "\n"
        write_output(file, content, "--json")


def _print_table(name: str, kind: str, figures: dict[str, float]) -> None:
    table = Table(title=f"{kind} of {name}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, value in figures.items():
        table.add_row(key, f"{value:.15g}" if float(value).is_integer() else f"{value:.4f}")
    Terminal().print(table)


def _print_figure_table(figures: FigureTable) -> None:
    table = Table()
    table.add_column(figures.title)
    for name in figures.columns:
        table.add_column(name, justify="right")
    for name, values in figures.rows.items():
        table.add_row(name, *(f"{value:.15g}" if float(value).is_integer() else f"{value:.4f}" for value in values))
    Terminal().print(table)
    if figures.note:
        Terminal().print(figures.note)
