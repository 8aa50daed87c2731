"""Build shards from a table or a folder with a progress bar, and the `vlm data build` command over it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.build.builder import LEDGER, BuildSummary, Settings, build_shards
from data.build.builder import Progress as BuildProgress
from data.build.columns import Asked
from data.build.source import Source

_SHOWN_REASONS = 5


def build_with_progress(source: Source, folder: Path, settings: Settings, workers: int | None) -> BuildSummary:
    """Write the shards and say what was written and what was left out."""
    console = Console()
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

        summary = build_shards(source, folder, settings, workers=workers, report=show)
    for line in summary_lines(summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return summary


def summary_lines(summary: BuildSummary) -> list[str]:
    """What was built, in words."""
    size = f"{summary.num_bytes / 1e6:,.1f} MB"
    lines = [f"{summary.num_samples:,} samples in {len(summary.shards):,} shards ({size}): {summary.folder}"]
    if summary.num_bad:
        lines.append(f"{summary.num_bad:,} left out, listed in {summary.folder / LEDGER}:")
        shown = list(summary.reasons.items())[:_SHOWN_REASONS]
        lines += [f"  {count:,} x {reason}" for reason, count in shown]
    if summary.left_out:
        lines.append(f"columns of bytes, which json cannot hold, were left out: {', '.join(summary.left_out)}")
    return lines


def build(  # noqa: PLR0913 - the options of the command line
    source: Annotated[
        str,
        typer.Argument(
            help="A table (.csv, .tsv, .txt, .jsonl, .parquet), COCO captions (.json), a folder of images or Parquet."
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="The folder to write shards to.", metavar="OUT_DIR")],
    root: Annotated[Path | None, typer.Option(help="Where image paths start; default: the table's folder.")] = None,
    captions: Annotated[Path | None, typer.Option(help="The captions of a folder of images; else .txt beside.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of image paths or bytes.")] = None,
    caption_column: Annotated[list[str] | None, typer.Option(help="Column of captions; repeatable.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of class numbers.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels of the shorter side at most.")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="JPEG quality at most; else bytes stay.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 1000,
    prefix: Annotated[str, typer.Option(help="Shards are called PREFIX-000000.tar and so on.")] = "shard",
    shuffle: Annotated[int, typer.Option(help="Seed of the order, which makes any first shards a fair sample.")] = 0,
    in_order: Annotated[bool, typer.Option("--in-order", help="Keep the order of the table instead.")] = False,
    max_bad_share: Annotated[float, typer.Option(min=0, max=1, help="More left out than this is an error.")] = 0.01,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
) -> None:
    """Build webdataset shards from a table, COCO captions or an image folder; the same command goes on after a kill."""
    asked = Asked(image_column, tuple(caption_column or ()), label_column)
    settings = Settings(
        samples_per_shard=samples_per_shard,
        prefix=prefix,
        size=size,
        quality=quality,
        shuffle=None if in_order else shuffle,
        max_bad_share=max_bad_share,
    )
    build_with_progress(Source(source, root, captions, asked), folder, settings, workers)
