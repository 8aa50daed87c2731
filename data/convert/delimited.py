"""Tables of delimited text: CSV, TSV, `image|number|comment`, and Flickr8k's `image.jpg#0<TAB>caption`."""

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import polars as pl

from data.convert.columns import ColumnOptions, find_columns, is_usual
from data.convert.quoted import Cells, quoted_rows
from data.convert.table import FrameTable
from vlm.errors import UserError

_SEPARATORS = ("\t", "|", ",", ";")
_NUMBERED = re.compile(r"^(.+)#(\d+)$")
_IMAGE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)(#\d+)?$", re.IGNORECASE)
_NUMBER = r"^-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?$"
_CHUNK_ROWS = 100_000
_UNNAMED = "unnamed_"


class _Layout(NamedTuple):
    """The layout of a file: names of its columns, separator, and whether the first line is the header."""

    names: tuple[str, ...]
    separator: str
    has_header: bool
    numbered: bool


def read_delimited(path: Path, column_options: ColumnOptions) -> FrameTable:
    """Read a table whose separator and header its first line tells.

    Quotes are understood as Python's csv and pandas do, except in Flickr's formats, which have none. A row with more
    cells than the header, one whose quote is left open, or one that is not UTF-8, is a bad row.

    Raises:
        UserError: it is empty, not text, or a column is missing.
    """
    layout = _layout(path)
    columns = find_columns(layout.names, column_options, path.name)
    problems: dict[int, str] = {}
    parts = list(_parts(path, layout, problems))
    frame = pl.concat(parts) if parts else pl.DataFrame(schema=dict.fromkeys(layout.names, pl.String))
    texts = {columns.image, *columns.captions}
    empty = [name for name in layout.names if name.startswith(_UNNAMED) and frame[name].is_null().all()]
    frame = frame.drop(empty)  # a separator at the end of every line
    frame = frame.with_columns([_typed(frame[name]) for name in frame.columns if name not in texts])
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return FrameTable(frame, columns, fingerprint, problems)


def _layout(path: Path) -> _Layout:
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise UserError(f"{path}: is no text in UTF-8; save it as UTF-8, or name a .parquet, .jsonl or .json file so")
    line = next((line for line in start.decode("utf-8-sig", "replace").splitlines() if line.strip()), "")
    if not line:
        raise UserError(f"{path}: is empty")
    tabbed = line.split("\t")
    if len(tabbed) == 2 and (match := _NUMBERED.match(tabbed[0])) and _IMAGE.search(match[1]):
        return _Layout(("image", "number", "caption"), "\t", has_header=False, numbered=True)
    separator = max(_SEPARATORS, key=lambda sep: (_num_usual(line, sep), len(line.split(sep))))
    cells = _named(cell.strip() for cell in next(csv.reader([line], delimiter=separator)))
    if _IMAGE.search(cells[0]) and len(cells) > 1:
        separator = next(sep for sep in _SEPARATORS if _IMAGE.search(line.split(sep)[0].strip('" ')))
        count = min(3, len(next(csv.reader([line], delimiter=separator))))
        names = ("image", "number", "caption") if count == 3 else ("image", "caption")
        return _Layout(names, separator, has_header=False, numbered=False)
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: its header names the column {twice!r} twice")
    return _Layout(cells, separator, has_header=True, numbered=False)


def _named(header: Iterable[str]) -> tuple[str, ...]:
    """The header's cells; those without a name (pandas writes its index so) are called by their place."""
    return tuple(cell or f"{_UNNAMED}{place}" for place, cell in enumerate(header, 1))


def _num_usual(line: str, separator: str) -> int:
    cells = line.split(separator)
    return sum(is_usual(cell.strip('" ')) for cell in cells) if len(cells) > 1 else 0


def _parts(path: Path, layout: _Layout, problems: dict[int, str]) -> Iterator[pl.DataFrame]:
    """The rows as columns of text, some at a time: Python's lists would take ten times the memory."""
    count = 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = _rows(file, layout)
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            for row, cells in enumerate(chunk, count):
                if problem := cells.problem or _problem(cells.values, len(layout.names)):
                    problems[row] = problem
            count += len(chunk)
            values = [cells.values for cells in chunk]
            columns = ([row[i] or None if i < len(row) else None for row in values] for i in range(len(layout.names)))
            yield pl.DataFrame(
                [pl.Series(name, cells, pl.String) for name, cells in zip(layout.names, columns, strict=True)]
            )


def _rows(file: Iterator[str], layout: _Layout) -> Iterator[Cells]:
    """The rows without the header, each cell stripped, without empty cells behind the last column."""
    rows = _unquoted(file, layout) if _has_no_quotes(layout) else _quoted(file, layout)
    if layout.has_header:
        next(rows)
    for cells in rows:
        values = [cell.strip() for cell in cells.values]
        while len(values) > len(layout.names) and not values[-1]:
            values.pop()
        yield Cells(values, cells.problem)


def _quoted(file: Iterator[str], layout: _Layout) -> Iterator[Cells]:
    width = len(layout.names)
    return quoted_rows(
        file, layout.separator, lambda cells: len(cells) == width and any(_IMAGE.search(cell.strip()) for cell in cells)
    )


def _has_no_quotes(layout: _Layout) -> bool:
    return layout.numbered or layout.separator == "|"


def _unquoted(file: Iterator[str], layout: _Layout) -> Iterator[Cells]:
    for line in file:
        cells = line.rstrip("\r\n").split(layout.separator)
        if layout.numbered and (match := _NUMBERED.match(cells[0])):
            yield Cells([match[1], match[2], *cells[1:]])
        elif cells != [""]:
            yield Cells(cells)


def _problem(cells: list[str], width: int) -> str | None:
    if len(cells) > width:
        return f"the row has {len(cells)} cells, not {width}: is a separator within a text not quoted?"
    return "the row is not UTF-8" if any("\ufffd" in cell for cell in cells) else None


def _typed(column: pl.Series) -> pl.Series:
    """The column as numbers where that loses nothing: "007" stays text."""
    values = column.drop_nulls()
    if values.is_empty() or not values.str.contains(_NUMBER).all():
        return column
    integers = column.cast(pl.Int64, strict=False)
    if integers.null_count() == column.null_count():
        return integers
    return column.cast(pl.Float64)
