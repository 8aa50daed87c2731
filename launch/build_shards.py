"""Build shards from a table or a folder with a progress bar, and the `vlm data build` command over it."""

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.convert.builder import LEDGER, BuildOptions, BuildProgress, BuildSummary, build_shards
from data.convert.classes import CLASSES
from data.convert.source import BuildSource
from data.pools.base import Workers
from vlm.terminal import Terminal, one_line

_SHOWN_REASONS = 5


def build_with_progress(source: BuildSource, folder: Path, options: BuildOptions, workers: Workers) -> BuildSummary:
    """Write the shards and say what was written and what was left out."""
    console = Terminal()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[bad]:,} left out"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the table", total=None, bad=0)

        def show(now: BuildProgress) -> None:
            bar.update(task, description=now.stage, completed=now.done, total=now.total, bad=now.bad)

        summary = build_shards(source, folder, options, workers=workers, report=show)
    for line in summary_lines(summary):
        console.print(one_line(line), soft_wrap=True)
    return summary


def summary_lines(summary: BuildSummary) -> list[str]:
    """The result of a build, in words."""
    size = f"{summary.num_bytes / 1e6:,.1f} MB"
    lines = [f"{summary.num_samples:,} samples in {len(summary.shards):,} shards ({size}): {summary.folder}"]
    if summary.num_classes is not None:
        lines.append(f"{summary.num_classes:,} class names, for `vlm eval zeroshot`: {summary.folder / CLASSES}")
    if summary.num_bad:
        lines.append(f"{summary.num_bad:,} left out, listed in {summary.folder / LEDGER}:")
        shown = list(summary.reasons.items())[:_SHOWN_REASONS]
        lines += [f"  {count:,} x {reason}" for reason, count in shown]
    if summary.left_out:
        lines.append(f"columns of bytes, which json cannot hold, were left out: {', '.join(summary.left_out)}")
    return lines
