"""What this process is doing, for whoever looks from another thread while it hangs: phases, collectives, awaited data.

Phases are also the ranges of a profile: `ranges` makes one where somebody takes it.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType


class Activity:
    """The doings of the main thread, written by it without a lock.

    Attributes:
        phases: the names of what goes on, the innermost last.
        entered: how many phases were entered; all ranks enter the same ones, so that one that is behind is found.
        collectives: how many of our own collectives were entered; engines have others.
        collective: the last of them.
        in_collective: whether it is not over yet.
        awaited: says what data is waited for; None: none is.
        step: how many steps of a run are done.
        alive: when something was last done that shows that the work goes on.
        slack: how many times longer than a step what goes on now may take.
    """

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.entered = 0
        self.collectives = 0
        self.collective = ""
        self.in_collective = False
        self.awaited: Callable[[], str] | None = None
        self.step = 0
        self.alive = time.monotonic()
        self.slack = 1.0
        self.ranges: Callable[[str], AbstractContextManager[object]] | None = None

    def touch(self, slack: float = 1.0) -> None:
        """Take note that the work goes on; what comes now may take `slack` times as long as a step."""
        self.alive, self.slack = time.monotonic(), slack


activity = Activity()
"""This process's; a fork has a copy that nobody reads."""


class phase:  # noqa: N801 - a context manager, as those of contextlib
    """A block of work with a name: seen by the hang watch, and a range in a profile."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._range: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        activity.phases.append(self._name)
        activity.entered += 1
        if activity.ranges is not None:
            self._range = activity.ranges(self._name)
            self._range.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._range is not None:
            self._range.__exit__(kind, error, traceback)
        activity.phases.pop()


class collective(phase):  # noqa: N801
    """A phase in which all ranks come together, with a name and a number of its own."""

    def __init__(self, name: str) -> None:
        super().__init__("communication")
        self._collective = name

    def __enter__(self) -> None:
        activity.collectives += 1
        activity.collective, activity.in_collective = self._collective, True
        super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        activity.in_collective = False


class awaiting:  # noqa: N801
    """A block in which data is waited for; `describe` says of whom, whenever it is asked."""

    def __init__(self, describe: Callable[[], str]) -> None:
        self._describe = describe

    def __enter__(self) -> None:
        activity.awaited = self._describe

    def __exit__(self, *_: object) -> None:
        activity.awaited = None
