"""`vlm data check`: read shards with a progress bar and say what is in them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from launch.options import grouped
from launch.pool_options import WorkerOptions
from vlm.errors import UserError
from vlm.terminal import Terminal, one_line

if TYPE_CHECKING:
    from data.check.report import CheckConfig, CheckReport
    from data.pools.base import Workers

_SHOWN_EXAMPLES = 5
_SHOWN_KINDS = 20


@grouped
def check(  # noqa: PLR0913 - the options of the command line
    shards: Annotated[list[str], typer.Argument(help="Shards: names, {00..03} and * patterns.", metavar="SHARDS...")],
    where: WorkerOptions,
    against: Annotated[
        list[str] | None, typer.Option(help="Shards (a test set) whose pictures should not be there; repeatable.")
    ] = None,
    distance: Annotated[int, typer.Option(min=0, max=16, help="Hash bits in which the same picture may differ.")] = 4,
    tokens: Annotated[bool, typer.Option("--tokens/--no-tokens", help="Count the CLIP tokens of captions.")] = True,
    images: Annotated[
        bool,
        typer.Option(
            "--images/--no-images", help="Read images; without, a text alone is a sample, as with data.images: false."
        ),
    ] = True,
    mark: Annotated[str, typer.Option(help="The place of an image in the text of a document.")] = "<image>",
    listed: Annotated[
        int, typer.Option(min=0, max=10**9, help="Findings and groups of a kind that the JSON names.")
    ] = 100,
    max_bad_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit code 1 when more than this share cannot be used.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Also draw the distributions into this folder.")] = None,
) -> None:
    """Read every sample once: counts, sizes, caption lengths, duplicates, and all that training could not use."""
    from pydantic import ValidationError

    from data.check.report import CheckConfig
    from vlm.config import first_problem

    try:
        config = CheckConfig(distance_bits=distance, listed=listed, clip_tokens=tokens, mark=mark, images=images)
    except ValidationError as error:
        raise UserError(f"--{first_problem(error, CheckConfig)}") from error
    with where.open() as workers:
        report = run_check(shards, against or (), config, json_file=json_file, plots=plots, workers=workers)
    if max_bad_share is not None and report.bad_share > max_bad_share:
        print(f"bad samples: {report.bad_share:.2%}, more than {max_bad_share:.2%}")
        raise typer.Exit(1)


def run_check(
    patterns: "Iterable[str]",
    against: "Iterable[str]",
    config: "CheckConfig",
    *,
    json_file: Path | None,
    plots: Path | None,
    workers: "Workers",
) -> "CheckReport":
    """Check the shards with a progress bar, print the tables, write the files asked for."""
    from data.check.plots import PLOTS, draw_plots
    from data.check.report import check_shards
    from data.shards.patterns import expand_shards, require_no_command
    from vlm.paths import output_file, output_folder

    json_file = None if json_file is None else output_file(json_file, "--json")
    plots = None if plots is None else output_folder(plots, "--plots", files=PLOTS)
    names = expand_shards(tuple(patterns), None, "SHARDS")
    given = tuple(against)
    if given and not config.images:
        raise UserError("--against: compares pictures, and --no-images reads none")
    others = expand_shards(given, None, "--against") if given else ()
    require_no_command((*names, *others), "SHARDS")
    console = Terminal()
    columns = (TextColumn("checking shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=len(names) + len(others))
        report, histograms = check_shards(
            names, config, against=others, workers=workers, progress=lambda _: bar.update(task, advance=1)
        )
    print_report(report, console)
    if json_file is not None:
        report.write(json_file)
    if plots is not None:
        draw_plots(histograms, plots)
    return report


def print_report(report: "CheckReport", console: Terminal) -> None:
    """The report as tables: what is there, its distributions, what is wrong with it, what is there twice."""
    for table in (_counts(report), _distributions(report), _problems(report), _duplicates(report)):
        if table.row_count:
            console.print(table)
    for kind, problems in report.problems.items():
        for example in problems.listed[:_SHOWN_EXAMPLES]:
            console.print(one_line(f"{kind}: {example.shard} {example.key}: {example.reason}"), soft_wrap=True)


def _counts(report: "CheckReport") -> Table:
    table = Table(title="Shards", show_header=False)
    for name, value in (("shards", report.shards), ("samples", report.samples), ("bytes", report.bytes)):
        table.add_row(name, f"{value:,}")
    table.add_row("unusable", f"{report.bad_samples:,} ({report.bad_share:.2%})")
    for name, tally in (("members", report.suffixes), ("formats", report.formats), ("modes", report.modes)):
        shown = [f"{key:.60} {count:,}" for key, count in list(tally.items())[:_SHOWN_KINDS]]
        shown += [f"{len(tally) - _SHOWN_KINDS:,} more kinds"] if len(tally) > _SHOWN_KINDS else []
        table.add_row(name, ", ".join(shown))
    return table


def _distributions(report: "CheckReport") -> Table:
    table = Table(title="Distributions", padding=(0, 0))  # fits into 80 columns; the JSON has more quantiles
    table.add_column("distribution", no_wrap=True)
    for name in ("count", "min", "1 %", "median", "mean", "99 %", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, d in report.distributions.items():
        if d.count:
            q = d.quantiles
            figures = (d.count, d.min, q["0.01"], q["0.5"], d.mean, q["0.99"], d.max)
            table.add_row(name, *(f"{figure or 0:,.5g}" if figure != d.count else f"{d.count:,}" for figure in figures))
    return table


def _problems(report: "CheckReport") -> Table:
    table = Table("problem", title="Problems")
    table.add_column("found", justify="right")
    for kind, problems in report.problems.items():
        table.add_row(kind, f"{problems.count:,}")
    return table


def _duplicates(report: "CheckReport") -> Table:
    duplicates = report.duplicates
    table = Table("duplicates", title="Duplicates")
    table.add_column("groups", justify="right")
    table.add_column("samples", justify="right")
    near = f"pictures within {duplicates.distance_bits} bits"
    pictures = {
        "files": duplicates.files,
        "equal pictures": duplicates.equal_pictures,
        near: duplicates.near_pictures,
    }
    for name, groups in {**(pictures if report.images else {}), "keys": duplicates.keys}.items():
        table.add_row(name, f"{groups.groups:,}", f"{groups.samples:,}")
    if duplicates.against is not None:
        table.add_row("pictures of the other set", "", f"{duplicates.against.samples:,}")
    return table
