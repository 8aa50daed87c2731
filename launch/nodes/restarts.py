"""Whether ranks that ended are started again: not after a user's mistake, and not into the same wall three times."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.ends.end import FAILURE, USER, code_of
from vlm.ends.failures import FAILURES
from vlm.training.run_files import METRICS

SAME_END = 3
"""So many lives in a row that end alike at the same step are a storm."""
_STOPPED = {code_of(number) for number in (1, 2, 10, 15)} | {-1, -2, -10, -15}
_TAIL = 65_536  # bytes of the metrics that are looked at for the last step
_PASSED_ON = re.compile(r"rank \d+ ended: ")
_COUNTED = re.compile(r"\d+")


class _LifeEnd(NamedTuple):
    """How a life ended: the step, the words without what differs from life to life, and the words."""

    step: int | None
    kind: str
    message: str


class Verdict(NamedTuple):
    """Whether the ranks are started again; words on why, or why not, and the exit code if not."""

    goes_on: bool
    words: str
    code: int = FAILURE


class Restarts:
    """The lives of a run's ranks on this node, as its record tells of them."""

    def __init__(self, run: Path) -> None:
        self._failures = run / FAILURES
        self._metrics = run / METRICS
        self._read_to = 0
        self._ends: list[tuple[int | None, str]] = []

    def begin(self) -> None:
        """Take note that a life begins."""
        self._read_to = self._failures.stat().st_size if self._failures.exists() else 0

    def verdict(self, codes: Sequence[int]) -> Verdict:
        """Judge a life whose ranks on this node ended with these codes, the first to end first."""
        records = self._records()
        first = codes[0] if codes else FAILURE
        if first in _STOPPED:
            self._ends.clear()
            return Verdict(True, "they were stopped, and what they did is saved")
        if first == USER and not records:
            return Verdict(False, "what is wrong is said above, and no restart would mend it", USER)
        end = self._end(records, first)
        self._ends.append((end.step, end.kind))
        alike = self._ends[-SAME_END:]
        if len(alike) == SAME_END and len(set(alike)) == 1:
            where = "before the first step" if end.step is None else f"at step {end.step}"
            code = USER if first == USER else FAILURE
            return Verdict(False, f"the same end {SAME_END} times {where}, and no step more: {end.message}", code)
        return Verdict(True, end.message)

    def _end(self, records: list[dict[str, Any]], code: int) -> _LifeEnd:
        """The cause: what a rank found itself goes before what others heard or saw of it."""
        causes = [record for record in records if record["kind"] != "lost"] or records
        message = str(causes[0].get("message", "")) if causes else f"a rank ended with {code} without a word"
        message = _PASSED_ON.sub("", message)
        step = causes[0].get("step") if causes else None
        return _LifeEnd(step if isinstance(step, int) else self._last_step(), _COUNTED.sub("#", message), message)

    def _records(self) -> list[dict[str, Any]]:
        """The ends of ranks that were recorded in this life."""
        try:
            data = self._failures.read_bytes()
        except OSError:
            return []
        new = data[self._read_to :] if len(data) >= self._read_to else data  # begun anew: the file is shorter
        return [record for record in _lines(new) if "exit_code" in record and isinstance(record.get("kind"), str)]

    def _last_step(self) -> int | None:
        try:
            with self._metrics.open("rb") as file:
                file.seek(max(0, self._metrics.stat().st_size - _TAIL))
                steps = [record.get("step") for record in _lines(file.read())]
        except OSError:
            return None
        return next((step for step in reversed(steps) if isinstance(step, int)), None)


def _lines(data: bytes) -> list[dict[str, Any]]:
    """The records of whole lines; a torn one says nothing."""
    records = []
    for line in data.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
