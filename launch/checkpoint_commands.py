"""The `vlm checkpoint` commands: thin, with the programs behind them."""

from typing import Annotated

import typer

from vlm.errors import UserError
from vlm.imports import fast_imports

checkpoint_app = typer.Typer(help="Verify, prune and copy the checkpoints of runs.", no_args_is_help=True)


@checkpoint_app.command()
def verify(
    places: Annotated[
        list[str], typer.Argument(help="Checkpoints, or runs: all of theirs.", metavar="CHECKPOINT|RUN|URL")
    ],
) -> None:
    """Compare every file of checkpoints with its SHA-256; exit code 1 if one is not as it was written."""
    with fast_imports():
        from launch.checkpoint_tools import verified

    whole = True
    for is_whole, line in verified(places):
        print(line, flush=True)
        whole &= is_whole
    if not whole:
        raise typer.Exit(1)


@checkpoint_app.command()
def prune(
    run: Annotated[str, typer.Argument(help="The run directory.", metavar="RUN")],
    last: Annotated[int, typer.Option(min=1, max=10**6, help="Keep the newest so many.")] = 2,
    every: Annotated[int | None, typer.Option(min=1, max=10**12, help="Keep each multiple of so many steps.")] = None,
    best: Annotated[
        list[str] | None,
        typer.Option(help="Keep the best by a figure: eval/EVALUATION/METRIC=COUNT; repeatable.", metavar="FIGURE=N"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
) -> None:
    """Delete the checkpoints of a run that no option keeps; none that another process reads."""
    counts = dict(_count(text) for text in best or ())
    with fast_imports():
        from launch.checkpoint_tools import pruned

    for line in pruned(run, last, every, counts, dry_run=dry_run):
        print(line)


def _count(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    if not name or not count.isdecimal() or not 1 <= int(count[:9]) <= 10**6:
        raise UserError(f"prune: --best {text}: write FIGURE=COUNT, as in eval/retrieval/image_to_text_r@1=3")
    return name, int(count)


@checkpoint_app.command()
def copy(
    source: Annotated[str, typer.Argument(help="A checkpoint, or a run: its newest.", metavar="CHECKPOINT|RUN|URL")],
    target: Annotated[str, typer.Argument(help="The folder that it is put in.", metavar="DIR|URL")],
) -> None:
    """Copy a checkpoint between folders and stores (s3://, gs://, hf://, ...), compared with its manifest."""
    with fast_imports():
        from launch.checkpoint_copy import copy_checkpoint

    print(copy_checkpoint(source, target))
