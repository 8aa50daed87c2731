"""How far a run is: a bar on a terminal, plain lines elsewhere."""

import time
from datetime import timedelta
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@runtime_checkable
class ProgressDisplay(Protocol):
    """Shows the state of a run to a person."""

    def update(self, step: int, words: str) -> None:
        """Show that `step` steps are done; `words` are the figures of the moment."""

    def say(self, line: str) -> None:
        """Show one line that stays."""

    def close(self) -> None:
        """End the display."""


class Silent:
    """For ranks whose output nobody reads."""

    def update(self, step: int, words: str) -> None:  # noqa: D102
        pass

    def say(self, line: str) -> None:  # noqa: D102
        pass

    def close(self) -> None:  # noqa: D102
        pass


class Bar:
    """A bar with the figures of the moment and the time left."""

    def __init__(self, console: Console, start: int, total: int) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=total, completed=start, words="")
        self._progress.start()

    def update(self, step: int, words: str) -> None:  # noqa: D102
        self._progress.update(self._task, completed=step, words=words)

    def say(self, line: str) -> None:  # noqa: D102
        self._progress.console.print(line, highlight=False)

    def close(self) -> None:  # noqa: D102
        self._progress.stop()


class Lines:
    """One line at most every few seconds, for log files."""

    def __init__(self, console: Console, start: int, total: int, seconds_between: float = 5.0) -> None:
        self._console = console
        self._start = start
        self._total = total
        self._between = seconds_between
        self._began = time.monotonic()
        self._last = float("-inf")

    def update(self, step: int, words: str) -> None:  # noqa: D102
        now = time.monotonic()
        if now - self._last < self._between and step < self._total:
            return
        self._last = now
        left = (now - self._began) / max(1, step - self._start) * (self._total - step)
        self.say(f"step {step}/{self._total}  {words}  left {timedelta(seconds=round(left))}")

    def say(self, line: str) -> None:  # noqa: D102
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:  # noqa: D102
        pass


def make_progress(is_main: bool, start: int, total: int) -> ProgressDisplay:
    """The display that fits where this process writes to."""
    if not is_main:
        return Silent()
    console = Console()
    return Bar(console, start, total) if console.is_terminal else Lines(console, start, total)
