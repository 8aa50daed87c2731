"""The record of what went wrong in a run: one JSON line for each failure, from any rank, kept across resumes."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

FAILURES = "failures.jsonl"


class Failures:
    """Writer of `failures.jsonl` of one rank: the end of a rank, a step left out, a run taken over.

    A line is one `write` to a file opened for appending, so lines of several ranks do not mix. Where the run
    directory was never made, or its disk is full, nothing is written and nothing is raised: the line on the rank's
    stderr is the first record, this one the second.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self._path = run / FAILURES
        self._rank = rank

    def add(self, kind: str, message: str, **facts: Any) -> None:
        """Append one line: when, on which rank and host, the kind of failure (one word), a sentence, and its facts."""
        record = {"time": time.time(), "rank": self._rank, "host": socket.gethostname(), "kind": kind}
        line = json.dumps(record | {"message": message} | facts) + "\n"
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError:
            return
        try:
            os.write(file, line.encode())
        except OSError:
            return
        finally:
            os.close(file)
