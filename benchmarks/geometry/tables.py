"""The tables of the comparison of geometries, in Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from benchmarks.geometry.cloud_figures import CLOUD_FIGURES, PairedClouds, Resampled, cloud_figures, difference, shares
from benchmarks.geometry.run import GeometryRun, pairs_file
from benchmarks.geometry.twins import Twins

R1 = ("R@1 image to text", "R@1 text to image")
FIGURES = {"photos": (*CLOUD_FIGURES, *R1), "scenes": (*CLOUD_FIGURES, *R1, "zero-shot top-1")}
HEADINGS = {
    "photos": "Flickr8k: 1,000 test photographs",
    "scenes": "Scenes: 1,000 for retrieval, 1,800 for zero-shot over 72 classes",
}
_IN_PERCENT = (*R1, "zero-shot top-1", "separability")


class GeometryResult(NamedTuple):
    """A run, the name of its files, and what came of it."""

    run: GeometryRun
    key: str
    found: dict[str, Any]


class TwinsResult(NamedTuple):
    """A control and what came of it."""

    twins: Twins
    found: dict[str, Any]


def tables(runs: Sequence[GeometryResult], twins: Sequence[TwinsResult], work: Path) -> str:
    """For both sets the figures of each row and its differences to its base; then the control."""
    parts = []
    for name, heading in HEADINGS.items():
        rows: dict[str, list[dict[str, Resampled]]] = {}
        bases = {}
        for run in runs:
            rows.setdefault(run.run.row, []).append(_figures(run, name, work))
            bases[run.run.row] = run.run.base
        parts += [_values(heading, rows, FIGURES[name]), _differences(heading, rows, bases, FIGURES[name])]
    minutes = sum(run.found["seconds"] for run in runs) / 60
    scales = {row: [run.found["logit_scale"] for run in runs if run.run.row == row] for row in bases}
    learned = "; ".join(f"{row}: {np.mean(held):.1f}" for row, held in scales.items() if row.endswith("learned"))
    parts.append(f"Logit scale at the end (mean over seeds): {learned}.")
    parts.append(_control(twins))
    parts.append(f"{len(runs)} runs, one thread each: {minutes:.0f} minutes of training in all.")
    return "\n\n".join(parts)


def _figures(run: GeometryResult, name: str, work: Path) -> dict[str, Resampled]:
    held = load_file(pairs_file(work, run.key))
    clouds = PairedClouds(held[f"{name}/image"].astype(np.float64), held[f"{name}/text"].astype(np.float64))
    found = cloud_figures(clouds)
    for way, figure in zip(("image_to_text", "text_to_image"), R1, strict=True):
        ranks = np.array(run.found[name][way]).reshape(len(clouds.image), -1)
        found[figure] = shares((ranks <= 1).mean(axis=1))
    if name == "scenes":
        found["zero-shot top-1"] = shares(np.array(run.found["named"], dtype=np.float64))
    return found


def _values(heading: str, rows: dict[str, list[dict[str, Resampled]]], figures: Sequence[str]) -> str:
    lines = [f"| {heading} | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|"]
    for row, seeds in rows.items():
        cells = []
        for figure in figures:
            held = [float(found[figure][0]) for found in seeds]
            mean, least, most = (_number(value, figure) for value in (float(np.mean(held)), min(held), max(held)))
            cells.append(f"{mean} ({least} to {most})")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _differences(
    heading: str, rows: dict[str, list[dict[str, Resampled]]], bases: dict[str, str | None], figures: Sequence[str]
) -> str:
    short = heading.partition(":")[0]
    lines = [f"| {short}: difference | {' | '.join(figures)} |", "|---" * (len(figures) + 1) + "|"]
    for row, seeds in rows.items():
        base = bases[row]
        if not base:
            continue
        cells = []
        for figure in figures:
            value, low, high = difference([s[figure] for s in seeds], [s[figure] for s in rows[base]])
            mark = "**" if low > 0 or high < 0 else ""
            shown, least, most = (_number(number, figure, sign="+") for number in (value, low, high))
            cells.append(f"{mark}{shown}{mark} ({least} to {most})")
        lines.append(f"| {row}, against {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _control(twins: Sequence[TwinsResult]) -> str:
    lines = [
        "| two image towers, the same pictures, temperature 0.01 | gap at the start | largest | at the end"
        " | separability at start and end | nearest is the twin at the end |",
        "|---|---|---|---|---|---|",
    ]
    for start in dict.fromkeys(done.twins.start for done in twins):
        seen = [np.array(done.found["seen"]) for done in twins if done.twins.start == start]
        gaps = [[held[0, 1], held[:, 1].max(), held[-1, 1]] for held in seen]
        cells = [_spread([gap[place] for gap in gaps]) for place in range(3)]
        separable = " and ".join(f"{np.mean([held[place, 2] for held in seen]):.0%}" for place in (0, -1))
        nearest = f"{np.mean([held[-1, 3] for held in seen]):.1%}"
        lines.append(f"| {start} | {' | '.join(cells)} | {separable} | {nearest} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _number(value: float, figure: str, sign: str = "") -> str:
    if figure in _IN_PERCENT:
        return f"{100 * value:{sign}.1f}" + ("" if sign else "%")
    return f"{value:{sign}.1f}" if figure.startswith("effective") else f"{value:{sign}.3f}"
