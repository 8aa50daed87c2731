"""Measurements that outlive the script: one that was stopped goes on where it was."""

import argparse
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


def arguments_of_turns(description: str | None) -> argparse.Namespace:
    """The arguments of a script in which ways take turns: `ask` is what a fresh process of it measures and prints."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured")
    parser.add_argument("--ask", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def machine() -> str:
    """The day, the processor and how busy it is."""
    with Path("/proc/cpuinfo").open() as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    load = os.getloadavg()[0]
    return f"{datetime.date.today()}, {os.cpu_count()} cores, {model or platform.machine()}, load {load:.1f}"
