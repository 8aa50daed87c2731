"""Files of one JSON object a line, each of some step, that a run appends to; a kill may tear the last line only."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from vlm.errors import UserError, reason

_MOST_STEPS = 2**53


class Lines(NamedTuple):
    """The whole lines of a file as they are read, and whether a torn one behind them was left out."""

    records: list[dict[str, Any]]
    torn: bool


def read_lines(path: Path) -> Lines:
    """The lines of `path`; none where there is no such file.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object with a step.
    """
    try:
        *whole, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Lines([], torn=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    return Lines([_record(path, number, line) for number, line in enumerate(whole, start=1)], torn=bool(rest))


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        record = None
    step = record.get("step") if isinstance(record, dict) else None
    if not isinstance(record, dict) or type(step) is not int or not 0 <= step <= _MOST_STEPS:
        raise UserError(
            f"{path}: line {number} is damaged: no JSON object with a step (take the line out, or put a copy back)"
        )
    return record
