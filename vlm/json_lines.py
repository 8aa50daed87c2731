"""Files of one JSON object a line, each of some step, that a run appends to; a kill may tear the last line only.

The last key of a line is the CRC-32 of the line without it, so that no flipped bit is taken for a figure. A file of an
older version has none in any line.
"""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from vlm.errors import UserError, reason

CHECKSUM: Final = "crc32"
_MOST_STEPS = 2**53
_TO_MEND = "take the line out, or put a copy back"
_SEAL = re.compile(rb', "crc32": "([0-9a-f]{8})"}')


class Lines(NamedTuple):
    """The whole lines of a file as they are read, and whether a torn one behind them was left out."""

    records: list[dict[str, Any]]
    torn: bool


def sealed_line(record: Mapping[str, Any]) -> str:
    """A record as a line of such a file, its checksum last."""
    text = json.dumps(record)
    return f'{text[:-1]}, "{CHECKSUM}": "{zlib.crc32(text.encode()):08x}"}}\n'


def read_lines(path: Path) -> Lines:
    """The lines of `path` without their checksums; none where there is no such file.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object with a step, or does not fit its checksum.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Lines([], torn=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    has_seals = any(_SEAL.search(line) for line in (*lines, rest))
    if _SEAL.search(rest) and not rest.endswith(b'"}'):  # a line whose end is no longer one
        lines.append(rest)
    records = [_record(path, number, line, has_seals) for number, line in enumerate(lines, start=1)]
    return Lines(records, torn=bool(rest))


def _record(path: Path, number: int, line: bytes, has_seals: bool) -> dict[str, Any]:
    if has_seals:
        seal = _SEAL.search(line)
        text = b"" if seal is None or seal.end() != len(line) else line[: seal.start()] + b"}"
        if seal is None or int(seal[1], 16) != zlib.crc32(text):
            raise UserError(f"{path}: line {number} is damaged: it does not fit its checksum ({_TO_MEND})")
        line = text
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        record = None
    step = record.get("step") if isinstance(record, dict) else None
    if not isinstance(record, dict) or type(step) is not int or not 0 <= step <= _MOST_STEPS:
        raise UserError(f"{path}: line {number} is damaged: no JSON object with a step ({_TO_MEND})")
    return record
