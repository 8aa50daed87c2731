"""The tables of a report: headline figures, evaluations, what ran, how recipes differ, what was skipped."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.figures import LOWER_NOTE, formatted, four_digits, marked
from eval.plots import short_number
from eval.run_record import RunRecord, metric_of
from vlm.metric import FigureTable, Metric

_MOST_HEADLINES = 6
_ABSENT = "—"


@dataclass(frozen=True)
class Cell:
    """A value in words; the best of its row is shown as such, and a share (0 to 1) as the depth of its shade."""

    text: str
    is_best: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of a name and one cell a column; without column names only the title stands above, the note below.

    `explained` are sentences on names of rows and columns, shown where a reader points at one.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    note: str = ""
    explained: Mapping[str, str] = field(default_factory=dict)


def headline_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """The few numbers that a reader looks for first: value, what it is, of which evaluation or unit."""
    figures = [
        (formatted(metric, points[-1][1]), marked(metric.title, metric), key.rpartition("/")[0])
        for key, points in run.evaluations.items()
        for metric in [run.metric(key)]
        if metric.prominence == "headline"
    ][: _MOST_HEADLINES - 2]
    loss = run.last("loss")
    if loss is not None:
        figures.append((four_digits(loss), "final loss", ""))
    left_out = run.left_out
    if left_out:
        figures.append((f"{left_out:,}", "steps left out, their loss or gradient being no finite number", ""))
    rates = [rate for _, rate in run.curve("samples_per_second") if math.isfinite(rate)]
    if rates:
        figures.append((four_digits(round(statistics.median(rates))), "samples a second", "median"))
    return figures


def evaluation_tables(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Table]:
    """The last figures of each evaluation: of one run as compact as they allow, of several run by run."""
    metrics = {key: metric_of(key, runs) for run in runs for key in run.evaluations}
    tables = []
    for evaluation in dict.fromkeys(key.rpartition("/")[0] for key in metrics):
        measured = {key: metric for key, metric in metrics.items() if key.rpartition("/")[0] == evaluation}
        if len(runs) > 1:
            tables.append(_comparison(evaluation, measured, names, runs))
        else:
            values = {metric: runs[0].evaluations[key][-1][1] for key, metric in measured.items()}
            tables.append(_single_table(evaluation, values))
    return tables


def _single_table(evaluation: str, values: Mapping[Metric, float]) -> Table:
    """The figures of one run: a row a group where all metrics are of one, else a row a metric; counts in the note."""
    counts = [f"{formatted(m, value)} {m.label}" for m, value in values.items() if m.unit == "count"]
    results = {metric: Cell(formatted(metric, value)) for metric, value in values.items() if metric.unit != "count"}
    note, explained = _note(results, counts), {marked(m.title, m): m.description for m in results}
    if not all(metric.group for metric in results):
        rows = [(marked(metric.title, metric), [cell]) for metric, cell in results.items()]
        return Table(evaluation, [], rows, note, explained)
    cells = {(metric.group, marked(metric.label, metric)): cell for metric, cell in results.items()}
    columns = list(dict.fromkeys(column for _, column in cells))
    rows = [
        (group, [cells.get((group, column), Cell(_ABSENT)) for column in columns])
        for group in dict.fromkeys(group for group, _ in cells)
    ]
    return Table(evaluation, columns, rows, note)


def _comparison(
    evaluation: str, metrics: Mapping[str, Metric], names: Sequence[str], runs: Sequence[RunRecord]
) -> Table:
    """The figures of several runs, a row a metric; the best is marked where the metric has a better side."""
    rows = []
    for key, metric in metrics.items():
        values = [run.evaluations[key][-1][1] if key in run.evaluations else None for run in runs]
        known = [value for value in values if value is not None]
        best = None
        if len(known) > 1 and metric.better is not None:
            best = max(known) if metric.better == "higher" else min(known)
        cells = [Cell(_ABSENT) if value is None else Cell(formatted(metric, value), value == best) for value in values]
        rows.append((marked(metric.title, metric), cells))
    explained = {marked(metric.title, metric): metric.description for metric in metrics.values()}
    return Table(evaluation, list(names), rows, _note(metrics.values(), []), explained)


def figure_tables(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Table]:
    """The last tables of evaluations, run by run; cells are shaded by shares, counts by those of their row."""
    return [
        Table(
            ": ".join([*([name] if len(runs) > 1 else []), key.rpartition("/")[0], table.title]),
            list(table.columns),
            [(row, _shaded(values, table)) for row, values in table.rows.items()],
            table.note,
        )
        for name, run in zip(names, runs, strict=True)
        for key, table in run.tables.items()
    ]


def profile_tables(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Table]:
    """What the time of profiled steps went into, run by run."""
    return [
        Table(
            f"{name}: {table.title}" if len(runs) > 1 else table.title,
            list(table.columns),
            [(row, _shaded(values, table)) for row, values in table.rows.items()],
            table.note,
        )
        for name, run in zip(names, runs, strict=True)
        for table in run.profile.values()
    ]


def _shaded(values: Sequence[float], table: FigureTable) -> list[Cell]:
    """The cells of a row; of several units, what is counted is no share of its row."""
    units = [table.unit] * len(values) if isinstance(table.unit, str) else table.unit
    total = sum(values) if table.unit == "count" else 0
    cells = []
    for value, unit in zip(values, units, strict=True):
        share = value if unit == "fraction" else value / total if total else None
        shade = None if share is None or not 0 <= share <= 1 else share
        cells.append(Cell(formatted(Metric("cell", unit=unit), value), share=shade))
    return cells


def _note(metrics: Iterable[Metric], counts: Sequence[str]) -> str:
    """Counts, and the meaning of the arrow where there is one."""
    arrows = [LOWER_NOTE] if any(metric.better == "lower" for metric in metrics) else []
    return "; ".join([*filter(None, [", ".join(counts)]), *arrows])


def alarm_table(names: Sequence[str], runs: Sequence[RunRecord]) -> Table | None:
    """Which alarms went off, and when."""
    several = len(runs) > 1
    rows = [
        (f"{name}, step {step:,}" if several else f"step {step:,}", [Cell(message.removeprefix("alarm: "))])
        for name, run in zip(names, runs, strict=True)
        for step, message in run.alarms
    ]
    return Table("", [], rows) if rows else None


def facts_table(names: Sequence[str], runs: Sequence[RunRecord]) -> Table | None:
    """Model, data, length, machine and versions of the runs, as far as they recorded them."""
    rows = [(label, [_text(read(run)) for run in runs]) for label, read in _FACTS.items()]
    packages = list(dict.fromkeys(name for run in runs for name in run.facts.get("versions", {})))
    for name in packages:
        rows.append((name, [run.facts.get("versions", {}).get(name) for run in runs]))
    recorded = [(label, [Cell(value or _ABSENT) for value in values]) for label, values in rows if any(values)]
    return Table("", _columns(names), recorded) if recorded else None


def recipe_differences(names: Sequence[str], runs: Sequence[RunRecord]) -> Table | None:
    """The recipe's keys in which several runs differ."""
    flat = [_flatten(run.recipe) for run in runs]
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe))
    differing = [key for key in keys if key != "run" and len({str(recipe.get(key)) for recipe in flat}) > 1]
    rows = [(key, [Cell(_text(recipe.get(key)) or _ABSENT) for recipe in flat]) for key in differing]
    return Table("Where the recipes differ", list(names), rows) if rows else None


def skip_table(names: Sequence[str], runs: Sequence[RunRecord]) -> Table | None:
    """How many samples of each source were skipped for which reason."""
    kinds = sorted({kind for run in runs for kind in run.skips})
    rows = [
        (f"{source}: {reason}", [Cell(f"{run.skips.get((source, reason), 0):,}") for run in runs])
        for source, reason in kinds
    ]
    note = "Samples that could not be used; the ledger names each of them."
    return Table("Source and reason", _columns(names), rows, note) if rows else None


def _columns(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) > 1 else []


def _model(run: RunRecord) -> str | None:
    model: Mapping[str, Any] = run.recipe.get("model") or {}
    named = model.get("open_clip")
    if named:
        return f"{named} ({model['pretrained']})" if model.get("pretrained") else str(named)
    towers = model.get("towers")
    return _text(towers) if towers else "own architecture" if model else None


def _data(run: RunRecord) -> str | None:
    sources = run.facts.get("data") or []
    return "; ".join(f"{s['name']}: {s['samples']:,} samples in {s['shards']} shards" for s in sources) or None


def _engine(run: RunRecord) -> str | None:
    engine, ranks = run.facts.get("engine"), run.facts.get("world_size")
    return engine and f"{engine}, {ranks} rank{'s' if ranks != 1 else ''}, {run.facts.get('precision', '')}".strip(", ")


def _machine(run: RunRecord) -> str | None:
    machine = run.facts.get("machine") or {}
    words = (machine.get("gpu"), machine.get("processor"), machine.get("cores") and f"{machine['cores']} cores")
    memory = machine.get("memory_gib")
    return (
        ", ".join(str(word) for word in (*words, memory and f"{memory:g} GiB", machine.get("system")) if word) or None
    )


_FACTS: dict[str, Callable[[RunRecord], Any]] = {
    "model": _model,
    "parameters": lambda run: short_number(size) if (size := run.facts.get("num_parameters")) is not None else None,
    "data": _data,
    "length": lambda run: run.recipe.get("duration"),
    "global batch": lambda run: run.recipe.get("global_batch"),
    "objective": lambda run: ", ".join(run.recipe.get("objective") or ()) or None,
    "engine": _engine,
    "machine": _machine,
    "threads": lambda run: run.facts.get("threads"),
    "started": lambda run: str(run.facts.get("started", "")).replace("T", " ") or None,
}


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(inner)}" for key, inner in value.items() if inner is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
