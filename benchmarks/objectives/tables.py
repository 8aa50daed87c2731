"""The tables of the comparison of objectives, in Markdown."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.objectives.intervals import (
    Interval,
    Ranks,
    median_difference,
    median_rank,
    recall,
    recall_difference,
)
from benchmarks.objectives.run import Run

WAYS = ("image_to_text", "text_to_image")
BASE = "clip"


class Measured(NamedTuple):
    """A run and what came of it."""

    run: Run
    found: dict[str, Any]


def table(measured: Sequence[Measured]) -> str:
    """For both directions a row an objective and batch: figures, spread over seeds, and differences to `clip`."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run, found in measured:
        groups.setdefault((run.batch, run.row), []).append(found)
    parts = []
    for way in WAYS:
        lines = [
            f"| {way.replace('_', ' ')} | batch | R@1 | R@5 | R@10 (seeds) | median rank (seeds)"
            " | R@10 against clip | median rank against clip |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for (batch, row), founds in sorted(groups.items(), key=lambda item: item[0][0]):
            base = groups.get((batch, BASE))
            lines.append(_line(row, batch, _ranks(founds, way), _ranks(base, way) if base and row != BASE else None))
        parts.append("\n".join(lines))
    parts.append(_cost(measured))
    return "\n\n".join(parts)


def search_table(measured: Sequence[Measured]) -> str:
    """R@10 and the median rank of each setting, image to text first."""
    lines = [
        "| objective | batch | learning rate | loss | R@10 both ways | median rank both ways |",
        "|---|---|---|---|---|---|",
    ]
    for run, found in measured:
        ranks = [_ranks([found], way) for way in WAYS]
        recalls = ", ".join(f"{recall(held, 10):.2%}" for held in ranks)
        medians = ", ".join(f"{median_rank(held):g}" for held in ranks)
        lines.append(f"| {run.row} | {run.batch} | {run.lr:g} | {found['loss']:.3f} | {recalls} | {medians} |")
    return "\n".join([*lines, "", _cost(measured)])


def put_between(name: str, file: Path, text: str) -> None:
    """Replace what stands between the markers of that name; without them the file is left alone."""
    whole = file.read_text()
    before, begin, rest = whole.partition(f"<!-- {name}: begin -->")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    if begin and end:
        file.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _ranks(founds: Sequence[dict[str, Any]], way: str) -> Ranks:
    """[seeds, images, queries an image]."""
    images = len(founds[0]["image_to_text"])
    return np.array([found[way] for found in founds]).reshape(len(founds), images, -1)


def _line(row: str, batch: int, ranks: Ranks, base: Ranks | None) -> str:
    recalls = [recall(held[None], 10) for held in ranks]
    medians = [median_rank(held[None]) for held in ranks]
    cells = [
        f"{row} | {batch} | {recall(ranks, 1):.2%} | {recall(ranks, 5):.2%}",
        f"{recall(ranks, 10):.2%} ({min(recalls):.1%} to {max(recalls):.1%})",
        f"{median_rank(ranks):.1f} ({min(medians):g} to {max(medians):g})",
    ]
    if base is None or len(base) != len(ranks):
        return f"| {' | '.join(cells)} | | |"
    gain, shift = recall_difference(ranks, base, 10), median_difference(ranks, base)
    return f"| {' | '.join(cells)} | {_told(gain, 100, 2)} points | {_told(shift, 1, 1)} |"


def _told(interval: Interval, factor: float, digits: int) -> str:
    """Bold where the interval lies on one side of 0."""
    value, low, high = (f"{factor * number:+.{digits}f}" for number in interval)
    mark = "**" if interval.beyond_zero else ""
    return f"{mark}{value}{mark} ({low} to {high})"


def _cost(measured: Sequence[Measured]) -> str:
    seconds = [found["seconds"] for _, found in measured]
    rates = [run.num_samples / found["seconds"] for run, found in measured]
    return (
        f"{len(measured)} runs of {measured[0].run.num_samples:,} samples, one thread each: median"
        f" {statistics.median(seconds):.0f} s and {statistics.median(rates):.0f} samples/s a run,"
        f" {sum(seconds) / 60:.0f} minutes in all."
    )
