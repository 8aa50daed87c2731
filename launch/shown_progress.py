"""Long work as it is shown: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vlm.progress import on_progress
from vlm.terminal import Terminal, one_line

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown_progress(*, is_main: bool = True) -> Iterator[None]:
    """Say within the block how far its work is: a bar on a terminal, elsewhere a line every ten seconds."""
    if not is_main:
        yield
        return
    console = Terminal(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, TaskID] = {}
        last_line = time.monotonic()

        def show(work: str, done: int, total: int) -> None:
            nonlocal last_line
            if work not in tasks:
                tasks[work] = bar.add_task(one_line(work), total=total)
            bar.update(tasks[work], completed=done, total=total)
            if not console.is_terminal and time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                print(one_line(f"{work} {done:,}/{total:,}"), file=sys.stderr)

        with on_progress(show):
            yield
