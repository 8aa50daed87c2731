"""Tables in JSON lines: held as the offsets of their lines, parsed when their turn comes."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.convert.columns import ColumnOptions, find_columns
from data.convert.entry import Row
from data.convert.table import SourceTable, text_series
from data.samples.bad_sample import BadSampleError
from data.stored_json import parse_json
from vlm.errors import UserError

_PROBED_LINES = 1000


class JsonLinesTable(SourceTable):
    """One JSON object a line; empty lines do not count, and a line that is none is a bad row.

    Raises:
        UserError: no object is among the first lines, or a column is missing.
    """

    def __init__(self, path: Path, column_options: ColumnOptions) -> None:
        self._path = path
        offsets, names, digest = array("q"), dict[str, None](), hashlib.sha256()
        offset = 0
        with path.open("rb") as file:
            for line in file:
                digest.update(line)
                if line.strip():
                    offsets.append(offset)
                    if len(offsets) <= _PROBED_LINES and not isinstance(row := _parse(line), BadSampleError):
                        names.update(dict.fromkeys(row))
                offset += len(line)
        self._offsets = np.asarray(offsets, dtype=np.int64)
        if not names:
            raise UserError(f"{path}: holds no JSON object in its first {_PROBED_LINES:,} lines")
        super().__init__(find_columns(tuple(names), column_options, path.name), digest.hexdigest())

    def __len__(self) -> int:
        return len(self._offsets)

    def image_paths(self) -> pl.Series | None:
        """The image column, in one pass over the file."""
        with self._path.open("rb") as file:
            rows = (_parse(line) for line in file if line.strip())
            return text_series(None if isinstance(row, BadSampleError) else row.get(self.columns.image) for row in rows)

    def labels(self) -> Iterable[Any]:
        """The label column, in one pass over the file."""
        with self._path.open("rb") as file:
            for line in file:
                if line.strip() and not isinstance(row := _parse(line), BadSampleError):
                    yield row.get(str(self.columns.label))

    def fetch(self, rows: NDArray[np.int64]) -> Sequence[Row]:
        """The rows with these numbers."""
        parsed = []
        with self._path.open("rb") as file:
            for offset in self._offsets[rows].tolist():
                file.seek(offset)
                parsed.append(_parse(file.readline()))
        return parsed


def _parse(line: bytes) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        return BadSampleError(f"the line is no JSON ({error})")
    return row if isinstance(row, dict) else BadSampleError(f"the line holds no JSON object but {line[:40]!r}")
