"""The report of one run, or of several side by side: one HTML file that needs nothing from outside."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader

from eval.charts import Chart, evaluation_charts, training_charts
from eval.galleries import Gallery, galleries
from eval.geometry_charts import geometry_charts
from eval.plots import short_number
from eval.run_record import RunRecord, read_run
from eval.tables import (
    Table,
    alarm_table,
    evaluation_tables,
    facts_table,
    figure_tables,
    headline_figures,
    profile_tables,
    recipe_differences,
    skip_table,
)
from vlm.errors import UserError
from vlm.paths import write_output
from vlm.progress import report_progress

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)

# What takes its time, by the name that the template gives it.
_CHARTS: Mapping[str, Callable[[Sequence[str], Sequence[RunRecord]], list[Chart]]] = {
    "evaluation_charts": evaluation_charts,
    "geometry_charts": geometry_charts,
    "training_charts": training_charts,
}


def write_report(run_dirs: Sequence[Path], target: Path) -> None:
    """Write the report of these runs to `target`, whole or not at all; several runs are compared.

    Raises:
        UserError: a folder is no run directory, a file in one is damaged, or the target cannot be written.
    """
    runs = [read_run(path) for path in run_dirs]
    names = run_names(run_dirs)
    page = _TEMPLATES.get_template("report.html.j2").render(_view(names, runs))
    write_output(target, page, "report")


def run_names(run_dirs: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    paths = [path.resolve() for path in run_dirs]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"report: {run_dirs[0]} is given twice")


def _view(names: Sequence[str], runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The values of the page's template; those that a run lacks are empty and left out."""
    charts: dict[str, list[Chart]] = {}
    for number, (kind, draw) in enumerate(_CHARTS.items()):
        report_progress("charts of the report", number, len(_CHARTS))
        charts[kind] = draw(names, runs)
    tables: dict[str, list[Table] | Table | None] = {
        "evaluation_tables": evaluation_tables(names, runs),
        "figure_tables": figure_tables(names, runs),
        "profile_tables": profile_tables(names, runs),
        "alarms": alarm_table(names, runs),
        "facts": facts_table(names, runs),
        "differences": recipe_differences(names, runs),
        "skips": skip_table(names, runs),
    }
    pictures: list[Gallery] = galleries(names, runs)
    return {
        "title": names[0] if len(runs) == 1 else f"{len(runs)} runs compared",
        "names": names,
        "headlines": headline_figures(runs[0]) if len(runs) == 1 else [],
        "recipes": [
            (name, yaml.safe_dump(dict(run.recipe), sort_keys=False)) for name, run in zip(names, runs, strict=True)
        ],
        "subtitle": _subtitle(runs[0]) if len(runs) == 1 else "",
        "galleries": pictures,
        **charts,
        **tables,
    }


def _subtitle(run: RunRecord) -> str:
    last = run.training[-1] if run.training else None
    size, started = run.facts.get("num_parameters"), str(run.facts.get("started", ""))
    facts = (
        f"{last['step']:,} steps, {short_number(last['samples'])} samples" if last else "no step logged yet",
        f"{short_number(size)} parameters" if size else None,
        f"started {started.replace('T', ' ')[:16]}" if started else None,
    )
    return " · ".join(words for words in facts if words)
