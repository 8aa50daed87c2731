"""`vlm data filter`: filter shards with a progress bar and say what each rule dropped."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from launch.options import grouped
from launch.pool_options import WorkerOptions
from vlm.terminal import Terminal

if TYPE_CHECKING:
    from data.filter.rules import AlignRules
    from data.filter.run import FilterJob, FilterReport
    from data.pools.base import Workers


@dataclass(frozen=True)
class RuleOptions:
    """ALIGN's rules as options; `max_aspect` and `distance` are `max_aspect_ratio` and `distance_bits` there."""

    distance: Annotated[int, typer.Option(min=0, max=16, help="Hash bits in which a test picture may differ.")] = 4
    min_side: Annotated[int, typer.Option(min=0, max=10**6, help="Pixels that the shorter side must exceed.")] = 200
    max_aspect: Annotated[float, typer.Option(min=1, max=1e6, help="Longer / shorter side must be below this.")] = 3.0
    max_texts_per_image: Annotated[int, typer.Option(min=1, max=10**9, help="An image with more texts is dropped.")] = (
        1000
    )
    max_images_per_text: Annotated[int, typer.Option(min=1, max=10**9, help="A text of more images is dropped.")] = 10
    max_ngrams: Annotated[
        int,
        typer.Option(min=1, max=10**12, help="Most frequent unigrams and bigrams; a text with any other is dropped."),
    ] = 100_000_000
    min_ngram_count: Annotated[
        int, typer.Option(min=1, max=10**9, help="A unigram or bigram seen fewer times is rare too: for small data.")
    ] = 1
    min_words: Annotated[int, typer.Option(min=0, max=10**6, help="Least unigrams of a text.")] = 3
    max_words: Annotated[int, typer.Option(min=1, max=10**6, help="Most unigrams of a text.")] = 20
    image_identity: Annotated[str, typer.Option(help="What makes two images one: bytes, url or picture.")] = "bytes"
    without: Annotated[list[str] | None, typer.Option(help="A rule to leave out; repeatable.")] = None

    def rules(self) -> "AlignRules":
        """The rules; a mistake in them ends in one line."""
        from pydantic import ValidationError

        from data.filter.rules import AlignRules
        from vlm.config import first_problem
        from vlm.errors import UserError

        limits = vars(self) | {"without": tuple(self.without or ())}
        limits |= {"max_aspect_ratio": limits.pop("max_aspect"), "distance_bits": limits.pop("distance")}
        try:
            return AlignRules.model_validate(limits)
        except ValidationError as error:
            raise UserError(first_problem(error, AlignRules)) from error


@dataclass(frozen=True)
class OutputOptions:
    """Where a filter writes, and what."""

    out: Annotated[Path, typer.Option(help="The folder for the filtered shards.")]
    counts: Annotated[
        Path | None, typer.Option(help="Use the counts that an earlier run left in this folder (its WORK/counts).")
    ] = None
    work: Annotated[Path | None, typer.Option(help="The folder for rows and counts; default: OUT/work.")] = None
    list_only: Annotated[bool, typer.Option("--list-only", help="Write OUT/kept.parquet, but no shards.")] = False


@grouped
def filter_noisy(
    shards: Annotated[list[str], typer.Argument(help="Shards: names, {00..03} and * patterns.", metavar="SHARDS...")],
    output: OutputOptions,
    options: RuleOptions,
    where: WorkerOptions,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Shards of a test set, whose pictures are dropped; repeatable.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Filter noisy alt text by ALIGN's rules, each with the paper's default, over shards too large for memory.

    Of a sample with several captions, those that break a rule are removed; it is dropped when none is left. There is
    no filter against pornography here: that needs a classifier.
    """
    from data.filter.run import FilterJob
    from data.shards.patterns import expand_shards, require_no_command
    from vlm.paths import local_path, output_file

    json_file = None if json_file is None else output_file(json_file, "--json")
    out = local_path(output.out, "--out")
    work = None if output.work is None else local_path(output.work, "--work")
    counts = None if output.counts is None else local_path(output.counts, "--counts")
    rules = options.rules()
    names = expand_shards(shards, None, "SHARDS")
    excluded = expand_shards(exclude, None, "--exclude") if exclude else ()
    require_no_command((*names, *excluded), "SHARDS")
    job = FilterJob(names, rules, out, excluded, work, counts, output.list_only)
    with where.open() as workers:
        run_filter(job, workers, json_file)


def run_filter(job: "FilterJob", workers: "Workers", json_file: Path | None) -> "FilterReport":
    """Filter with a progress bar for each pass, print the table of what was dropped, write the figures."""
    from data.filter.run import filter_shards

    console = Terminal()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        passes: dict[str, TaskID] = {}

        def advance(name: str, total: int) -> None:
            if name not in passes:
                passes[name] = bar.add_task(name, total=total)
            else:
                bar.update(passes[name], advance=1)

        report = filter_shards(job, workers=workers, progress=advance)
    console.print(dropped_table(report))
    console.print(f"filtered: {job.out}", soft_wrap=True)
    if json_file is not None:
        report.write(json_file)
    return report


def dropped_table(report: "FilterReport") -> Table:
    """For each rule, in the order applied: what it dropped first, and what it would drop alone."""
    table = Table("rule", title="Dropped")
    levels = list(report.dropped)
    for level in levels:
        table.add_column(f"{level}: first", justify="right")
        table.add_column("alone", justify="right")
    for rule in report.dropped[levels[0]].first:
        figures = [(report.dropped[level].first[rule], report.dropped[level].alone[rule]) for level in levels]
        table.add_row(rule, *(f"{number:,}" for pair in figures for number in pair))
    table.add_section()
    for name in ("kept", "total"):
        table.add_row(name, *(cell for level in levels for cell in (f"{getattr(report.dropped[level], name):,}", "")))
    return table
