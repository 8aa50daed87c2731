"""The history of a run: each life that it has had, and each checkpoint that it saved, left or set aside."""

import time
from pathlib import Path
from typing import Any, Literal

from vlm.atomic import write_bytes
from vlm.json_lines import read_lines, sealed_line

HISTORY = "history.jsonl"
Event = Literal["began", "resumed", "saved", "set_aside"]


class History:
    """Writer and reader of `history.jsonl`, which no resume cuts back; rank 0's."""

    def __init__(self, run: Path) -> None:
        self.path = run / HISTORY

    def add(self, event: Event, step: int, **facts: Any) -> None:
        """Append one line: when, what happened, after how many steps of the run."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(sealed_line({"time": time.time(), "event": event, "step": step} | facts))

    def mend(self) -> None:
        """Take away the end of a line that a kill tore, so that the next one begins anew."""
        if self.path.exists():
            complete, newline, torn = self.path.read_bytes().rpartition(b"\n")
            if torn:
                write_bytes(self.path, complete + newline)

    def last_saved(self) -> int | None:
        """After how many steps the run last had a checkpoint; None when it never did, or is older than its history.

        Raises:
            UserError: the file is damaged.
        """
        events = [record for record in read_lines(self.path).records if record.get("event") in ("saved", "resumed")]
        return next((event["step"] for event in reversed(events) if event["step"]), None)
