"""The record of a run as its directory tells it: recipe, facts, metrics, evaluations, skipped samples, examples."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.examples import EXAMPLES_FILE
from eval.metrics import shipped_metric
from eval.run_parts import (
    declared_metrics,
    figure_table,
    read_examples,
    read_facts,
    read_figures,
    read_recipe,
    read_skips,
)
from vlm.errors import UserError
from vlm.metric import FigureTable, Metric
from vlm.paths import below
from vlm.training.run_files import EXAMPLES, LEDGER, METRICS, RECIPE, RUN

Point = tuple[int, float]

_NOT_TERMS = {
    *("step", "samples", "samples_per_second", "data_wait"),
    *("loss", "logit_scale", "lr", "grad_norm", "steps_left_out", "patch_dropout"),
}
_EVALUATION, _GEOMETRY, _DATA, _PROFILE = "eval/", "geometry/", "data/", "profile/"


@dataclass(frozen=True)
class RunRecord:
    """One run as read from its directory; a part that the run has not written (yet) is empty.

    `training` holds the logged steps, `evaluations` the values over steps of "<evaluation>/<metric>", `geometry` those
    of the observed figures and `histograms` their counts by step, `alarms` what went off, and roll-backs, by step,
    `skips` how many samples of a source were left out for a reason, `examples` the best and worst images of an
    evaluation, `declared` its metrics as its evaluator declared them, `tables` the last "<evaluation>/<table>",
    `profile` the last table of the time of steps. `left_out` counts the steps that changed nothing or were undone.
    """

    path: Path
    recipe: Mapping[str, Any]
    facts: Mapping[str, Any]
    training: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Sequence[Point]]
    geometry: Mapping[str, Sequence[Point]]
    histograms: Mapping[str, Mapping[int, Sequence[int]]]
    alarms: Sequence[tuple[int, str]]
    skips: Mapping[tuple[str, str], int]
    examples: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
    declared: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)
    tables: Mapping[str, FigureTable] = field(default_factory=dict)
    profile: Mapping[str, FigureTable] = field(default_factory=dict)
    left_out: int = 0

    def metric(self, key: str) -> Metric:
        """The metric "<evaluation>/<metric>" as its evaluator declared it, or a shipped evaluator does.

        Of any other nothing is known: neither higher nor lower values of it are called better.
        """
        evaluation, _, name = key.rpartition("/")
        return self.declared.get(evaluation, {}).get(name) or shipped_metric(name) or Metric(name or "unnamed")

    @property
    def terms(self) -> list[str]:
        """The objective's terms that were logged."""
        return [name for name in self._logged() if name not in _NOT_TERMS and "/" not in name]

    @property
    def data_fractions(self) -> list[str]:
        """The logged shares of data: "data/source/<name>" of the samples, "data/<field>/<name>" of what was read."""
        return [name for name in self._logged() if name.startswith(_DATA) and name.count("/") > 1]

    def _logged(self) -> list[str]:
        return list(dict.fromkeys(key for line in self.training for key in line))

    def curve(self, key: str) -> list[Point]:
        """A logged quantity over steps."""
        return [(line["step"], line[key]) for line in self.training if isinstance(line.get(key), int | float)]

    def last(self, key: str) -> float | None:
        """The last logged value of a quantity."""
        curve = self.curve(key)
        return curve[-1][1] if curve else None


def metric_of(key: str, runs: Sequence[RunRecord]) -> Metric:
    """The metric "<evaluation>/<metric>" as the first of the runs that measured it knows it."""
    return next(run for run in runs if key in run.evaluations).metric(key)


def read_run(path: Path) -> RunRecord:
    """Read a run directory, finished or not.

    Raises:
        UserError: the folder is no run directory, or a file in it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run directory")
    if not any((path / name).is_file() for name in (RECIPE, METRICS)):
        raise UserError(f"{path}: not a run directory: it holds neither recipe.yaml nor metrics.jsonl")
    # A run from elsewhere may hold links to files that are not its own.
    lines = read_figures(below(path, METRICS, "report"))
    facts = read_facts(below(path, RUN, "report"))
    skips = read_skips(below(path, LEDGER, "report"))
    return RunRecord(
        path=path,
        recipe=read_recipe(below(path, RECIPE, "report")),
        facts=facts,
        training=[line for line in lines if "loss" in line],
        evaluations=_numbers(lines, _EVALUATION),
        geometry=_numbers(lines, _GEOMETRY),
        histograms=_histograms(lines),
        alarms=[(line["step"], words) for line in lines if (words := _event(line)) is not None],
        skips=Counter((line["source"], _kind(line["reason"])) for line in skips),
        examples=_examples(path),
        declared=declared_metrics(facts),
        tables=_tables(lines, _EVALUATION),
        profile=_tables(lines, _PROFILE),
        left_out=max((line.get("steps_left_out", 0) for line in lines), default=0),
    )


def _examples(path: Path) -> dict[str, dict[str, Any]]:
    """The listed examples of each evaluation; what else lies in the folder is left alone."""
    names = sorted(file.parent.name for file in path.glob(f"{EXAMPLES}/[!.]*/{EXAMPLES_FILE}"))
    return {name: read_examples(below(path, f"{EXAMPLES}/{name}/{EXAMPLES_FILE}", "report")) for name in names}


def _numbers(lines: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, list[Point]]:
    """The figures whose names begin so, over steps."""
    points: dict[str, list[Point]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(prefix) and isinstance(value, int | float):
                points.setdefault(key.removeprefix(prefix), []).append((line["step"], value))
    return points


def _tables(lines: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, FigureTable]:
    """The last table of each name that begins so."""
    tables = {
        key.removeprefix(prefix): value
        for line in lines
        for key, value in line.items()
        if key.startswith(prefix) and isinstance(value, dict)
    }
    return {key: figure_table(value) for key, value in tables.items()}


def _event(line: Mapping[str, Any]) -> str | None:
    """The words on what happened to the run there, if anything did."""
    if "rolled_back_to" in line:
        return f"rolled back to step {line['rolled_back_to']}, and the steps since then left out"
    return str(line["alarm"]) if "alarm" in line else None


def _histograms(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Sequence[int]]]:
    histograms: dict[str, dict[int, Sequence[int]]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(_GEOMETRY) and isinstance(value, list):
                histograms.setdefault(key.removeprefix(_GEOMETRY), {})[line["step"]] = value
    return histograms


def _kind(reason: str) -> str:
    """The reason without what is particular to one sample."""
    return reason.split(" (")[0].split(": ")[0].strip()
