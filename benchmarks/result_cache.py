"""Measurements that outlive the script: one that was stopped goes on where it was."""

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ResultCache:
    """Finished measurements in a file of `folder`; `again` drops those of earlier runs."""

    def __init__(self, folder: Path, name: str, again: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{name}.json"
        if again:
            self._file.unlink(missing_ok=True)
        self._values: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        """The measurement of that name: made now, unless it is there."""
        if name not in self._values:
            print(f"measuring: {name}", file=sys.stderr)
            self._values[name] = measure()
            self._file.write_text(json.dumps(self._values))
        return self._values[name]


def machine() -> str:
    """The day, the processor and how busy it is."""
    with Path("/proc/cpuinfo").open() as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    load = os.getloadavg()[0]
    return f"{datetime.date.today()}, {os.cpu_count()} cores, {model or platform.machine()}, load {load:.1f}"
