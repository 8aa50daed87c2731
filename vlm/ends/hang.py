"""The watch over a run that does not go on though every rank is there: who keeps the others waiting, and where."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm.activity import activity

HANG = 3  # the exit code
FOLDER = "hang"
ANSWER_SECONDS = 3.0
_LATER = 0.1  # of the limit: rank 0 asks the others before they judge by themselves

Report = Mapping[str, Any]


class HangWatch:
    """Judges, in the watching thread, whether this rank has stood still for too long. Off until a run's first step.

    Rank 0 asks all ranks what they are doing, and says who keeps the others waiting; where nobody is asked (rank 0
    itself is stopped), the others say so themselves, a little later.
    """

    def __init__(self, seconds: float, run: Path, rank: int, size: int) -> None:
        self.seconds = seconds
        self.interval = min(5.0, seconds / 4)
        self._folder = run / FOLDER
        self._rank = rank
        self._size = size
        self._checked = time.monotonic()
        self._asked: float | None = None
        self._was_asked = False
        self._reports: dict[int, Report] = {}

    def check(self, ask: Callable[[], None], others: Callable[[], Mapping[int, str]]) -> str | None:
        """Look whether the work goes on; a line on who keeps it, when it is sure that it does not.

        `ask` is called when the other ranks are to report; `others` says where they are.
        """
        now = time.monotonic()
        if now - self._checked > 2 * self.interval + 1:  # this process itself was stopped for a while
            activity.alive = now
        self._checked = now
        limit = self.seconds * activity.slack
        stood = now - activity.alive
        if stood < limit:
            self._asked, self._was_asked, self._reports = None, False, {}
            return None
        if self._rank != 0:
            if self._was_asked or stood < limit + max(ANSWER_SECONDS, _LATER * limit):
                return None
            self.report()
            return self._line(stood, f"rank 0{others().get(0, '')} asks nobody: stopped, or cut off?")
        if self._asked is None:
            self._asked, self._reports = now, {0: self.report()}
            ask()
        if len(self._reports) < self._size and now - self._asked < ANSWER_SECONDS:
            return None
        silent = {rank: where for rank, where in others().items() if rank not in self._reports}
        return self._line(stood, who_keeps_them(list(self._reports.values()), silent))

    def report(self) -> Report:
        """What this rank is doing; its stacks are written into the run."""
        self._was_asked = True
        describe, awaited = activity.awaited, ""
        with suppress(Exception):  # the main thread may be changing what is described
            awaited = "" if describe is None else describe()
        with suppress(OSError):  # a full disk is no reason to say nothing
            self._write(awaited)
        return {
            "rank": self._rank,
            "step": activity.step,
            "entered": activity.entered,
            "doing": _doing(),
            "awaited": awaited,
            "where": _where(),
        }

    def take(self, report: Report) -> None:
        """Keep another rank's report."""
        self._reports[int(report["rank"])] = report

    def _line(self, stood: float, who: str) -> str:
        begin = f"no step for {stood:.0f} s (hang_after), the last was step {activity.step}"
        return f"{begin}: {who}; what each rank was doing is in {self._folder}"

    def _write(self, awaited: str) -> None:
        self._folder.mkdir(exist_ok=True)
        state = "in" if activity.in_collective else "after"
        lines = (
            f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}",
            f"steps done: {activity.step}",
            f"doing: {' > '.join(activity.phases) or 'nothing that has a name'}",
            f"collectives: {state} number {activity.collectives} ({activity.collective or 'none'})",
            f"data: {awaited or 'none is waited for'}",
        )
        with (self._folder / f"rank-{self._rank}.txt").open("w", encoding="utf-8", errors="replace") as file:
            file.write("\n".join(lines) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def who_keeps_them(reports: Sequence[Report], silent: Mapping[int, str]) -> str:
    """Who keeps the other ranks waiting, in words; `silent` are those that did not answer, and where they are."""
    if silent:
        rank, where = min(silent.items())
        return f"rank {rank}{where} answers nothing: stopped, or cut off?"
    waiting = [report for report in reports if report["awaited"]]
    if waiting:
        return f"rank {waiting[0]['rank']} waits for {waiting[0]['awaited']}"
    behind = min(reports, key=lambda report: (report["step"], report["entered"], report["rank"]))
    where = f"in {behind['doing']}, at {behind['where']}"
    if len(reports) == 1:
        return f"it is {where}"
    if all((report["step"], report["entered"]) == (behind["step"], behind["entered"]) for report in reports):
        return f"all ranks are {where}: a network that stands?"
    return f"rank {behind['rank']} is {where}, and the others wait for it further on"


def _doing() -> str:
    """The phases of the main thread, and its last collective."""
    last = f"collective {activity.collectives}, {activity.collective}" if activity.in_collective else ""
    return f"{' > '.join(activity.phases) or 'no phase'}{last and f' ({last})'}"


def _where() -> str:
    """The line at which the main thread is: the innermost of our own, or else the innermost."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None:
        if "site-packages" not in frame.f_code.co_filename and "lib/python" not in frame.f_code.co_filename:
            break
        frame = frame.f_back
    found = frame or innermost
    return "an unknown line" if found is None else f"{Path(found.f_code.co_filename).name}:{found.f_lineno}"
