"""Tells how this process ends: once, on standard error and in the run's record."""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm.ends.end import End
from vlm.ends.failures import Failures

SHOW_TRACEBACK = "VLM_TRACEBACK"


class Teller:
    """Says the first end that it hears of; any thread may bring one, and what follows from it is silence."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self.reported: End | None = None
        self._record: Failures | None = None
        self._run: Path | None = None
        self.facts: Callable[[], dict[str, Any]] = dict  # what the record is to say of this moment: the step
        self._lock = threading.RLock()  # a signal's handler may interrupt a telling

    @property
    def rank(self) -> int:
        """Which rank this is: what a launcher said, until the ranks have met."""
        return int(os.environ.get("RANK", "0")) if self._rank is None else self._rank

    def set_rank(self, rank: int) -> None:
        """Take note that the ranks have met, and which of them this is."""
        self._rank = rank

    def record_in(self, run: Path) -> None:
        """Write the end into this run's directory too."""
        self._run = run
        self._record = Failures(run, self.rank)

    def report(self, end: End, error: BaseException | None = None) -> bool:
        """Tell an end, unless one was told; whether this was it. `error` is what nobody foresaw, kept in full."""
        with self._lock:
            if self.reported is not None:
                return False
            self.reported = end
        place = self._keep(error) if error is not None and end.kind == "failure" else ""
        if self._is_for_this_rank(end):
            self.notice(f"{end.message}{place}")
            if self._record is not None:
                self._record.add(end.kind, end.message, exit_code=end.code, **self.facts())
        return True

    def notice(self, line: str) -> None:
        """Write a line on standard error, with who says it."""
        who = "" if self.rank == 0 else f"rank {self.rank}: "
        with suppress(OSError, ValueError):  # nobody reads it any more
            sys.stderr.write(f"vlm: {who}{line}\n")
            sys.stderr.flush()

    def _is_for_this_rank(self, end: End) -> bool:
        if self.rank == 0:
            return True
        if end.everywhere and self._rank is not None:
            return False
        # Before they met, all ranks of a node find the same mistakes; those of another may have other files.
        return self._rank is not None or end.kind != "user" or os.environ.get("LOCAL_RANK", "0") == "0"

    def _keep(self, error: BaseException) -> str:
        """Keep the traceback where somebody who can read it finds it; words that say where."""
        text = "".join(traceback.format_exception(error))
        if os.environ.get(SHOW_TRACEBACK):
            with suppress(OSError, ValueError):
                sys.stderr.write(text)
            return ""
        if self._run is not None:
            path = self._run / f"traceback-rank-{self.rank}.txt"
            with suppress(OSError):
                path.write_text(text, encoding="utf-8", errors="replace")
                return f"; the traceback is in {path}"
        return f"; {SHOW_TRACEBACK}=1 shows the traceback"
