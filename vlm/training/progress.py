"""How far a run is: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm.terminal import Terminal, one_line


@runtime_checkable
class ProgressDisplay(Protocol):
    """Shows the state of a run to a person."""

    def update(self, step: int, words: str) -> None:
        """Show that `step` steps are done; `words` are the figures of the moment."""

    def note(self, words: str) -> None:
        """Show what goes on between two steps; it may be left out where much is said."""

    def say(self, line: str) -> None:
        """Show one line that stays."""

    def close(self) -> None:
        """End the display."""


class Silent:
    """For ranks whose output nobody reads."""

    def update(self, step: int, words: str) -> None:  # noqa: D102
        pass

    def note(self, words: str) -> None:  # noqa: D102
        pass

    def say(self, line: str) -> None:  # noqa: D102
        pass

    def close(self) -> None:  # noqa: D102
        pass


class Bar:
    """A bar with the figures of the moment and the time left."""

    def __init__(self, console: Terminal, start: int, total: int, steps_per_epoch: float) -> None:
        self._per_epoch = steps_per_epoch
        self._console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(
            "training", total=total, completed=start, words="the first batch is loaded"
        )
        self._progress.start()

    def update(self, step: int, words: str) -> None:  # noqa: D102
        line = f"epoch {step / self._per_epoch:.2f}  {words}"
        self._progress.update(self._task, completed=step, words=one_line(line))

    def note(self, words: str) -> None:  # noqa: D102
        self._progress.update(self._task, words=one_line(words))

    def say(self, line: str) -> None:  # noqa: D102
        show(self._console, line)

    def close(self) -> None:  # noqa: D102
        self._progress.stop()


class Lines:
    """One line at most every few seconds, for log files."""

    def __init__(
        self, console: Terminal, start: int, total: int, steps_per_epoch: float, seconds_between: float = 5.0
    ) -> None:
        self._console = console
        self._start = start
        self._total = total
        self._per_epoch = steps_per_epoch
        self._between = seconds_between
        self._began = time.monotonic()
        self._last = float("-inf")
        self._noted = self._began

    def update(self, step: int, words: str) -> None:  # noqa: D102
        now = time.monotonic()
        if now - self._last < self._between and step < self._total:
            return
        self._last = self._noted = now
        left = timedelta(seconds=round((now - self._began) / max(1, step - self._start) * (self._total - step)))
        self.say(f"step {step}/{self._total}  epoch {step / self._per_epoch:.2f}  {words}  left {left}")

    def note(self, words: str) -> None:  # noqa: D102
        now = time.monotonic()
        if now - self._noted >= self._between:
            self._noted = now
            self.say(words)

    def say(self, line: str) -> None:  # noqa: D102
        show(self._console, line)

    def close(self) -> None:  # noqa: D102
        pass


def make_progress(is_main: bool, start: int, total: int, steps_per_epoch: float) -> ProgressDisplay:
    """The display that fits where this process writes to."""
    if not is_main:
        return Silent()
    console = Terminal()
    kind = Bar if console.is_terminal else Lines
    return kind(console, start, total, steps_per_epoch)


def show(console: Terminal, line: str) -> None:
    """Print one line as it is: names out of data are no commands to the terminal."""
    console.print(one_line(line), soft_wrap=True)


def show_lines(is_main: bool, lines: Iterable[str]) -> None:
    """Print lines on rank 0 before there is a display."""
    if is_main:
        console = Terminal()
        for line in lines:
            show(console, line)
