"""Parquet tables: columns of text are held, image bytes are set aside in files that can be read at any place."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.convert.columns import ColumnOptions, find_columns
from data.convert.entry import Blob, Row
from data.convert.table import FrameTable
from data.pools.base import Pool
from vlm.errors import UserError, reason

_BATCH_ROWS = 64
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class _RowGroup:
    """One row group of one file, whose image bytes go to `path`, with their places beside it."""

    file: Path
    group: int
    column: str
    nested: bool
    path: Path
    num_rows: int

    @property
    def places(self) -> Path:
        return self.path.with_suffix(".npy")


class ParquetTable(FrameTable):
    """One or several Parquet files as one table, with images as paths, as bytes, or as structs of bytes and path.

    Rows with bytes are shuffled like any others, so the bytes are first copied, row group by row group, into plain
    files: a Parquet file gives up a single row only by decoding many.

    Raises:
        UserError: a file is no Parquet, the files differ in their columns, or a column is missing.
    """

    def __init__(self, files: Sequence[Path], column_options: ColumnOptions) -> None:
        tables = [_open(file) for file in files]
        schema = tables[0].schema_arrow
        for file, other in zip(files, tables, strict=True):
            if other.schema_arrow.names != schema.names:
                raise UserError(f"{file}: its columns differ from those of {files[0]}")
        twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{files[0]}: names the column {twice!r:.60} twice")
        columns = find_columns(schema.names, column_options, files[0].name)
        kind = schema.field(columns.image).type
        self._nested = pa.types.is_struct(kind)
        self._has_bytes = _is_binary(kind) or self._nested
        if self._nested and kind.get_field_index("bytes") < 0:
            raise UserError(f"{files[0]}: column {columns.image} is {kind}; a struct of images has bytes (and path)")
        left_out = tuple(f.name for f in schema if _holds_binary(f.type) and f.name != columns.image)
        read = [name for name in schema.names if name not in left_out and name != columns.image]
        if not self._has_bytes:
            read.append(columns.image)
        elif self._nested and kind.get_field_index("path") >= 0:
            read.append(f"{columns.image}.path")
        frame = _together(files, [_frame(file, one, read) for file, one in zip(files, tables, strict=True)])
        super().__init__(frame, columns, _fingerprint(files))
        self.left_out = left_out
        self.class_names = _class_names(schema, columns.label)
        self._files = files
        self._groups = [[one.metadata.row_group(i).num_rows for i in range(one.num_row_groups)] for one in tables]
        self._blobs: tuple[list[Path], NDArray[np.int64]] | None = None
        for one in tables:
            one.close()

    def image_paths(self) -> pl.Series | None:
        """The image column; None where it holds bytes."""
        return None if self._has_bytes else super().image_paths()

    def prepare(self, folder: Path, processes: Pool, report: Callable[[int, int], None]) -> None:
        """Copy the image bytes into `folder`; pieces that a killed build left complete are used."""
        if not self._has_bytes:
            return
        folder.mkdir(exist_ok=True)
        row_groups = self._row_groups(folder)
        missing = [row_group for row_group in row_groups if not row_group.places.exists()]
        done = len(self) - sum(row_group.num_rows for row_group in missing)
        for rows in processes.as_done(_set_aside, missing):
            done += rows
            report(done, len(self))
        places = [np.load(row_group.places) for row_group in row_groups]
        numbers = np.repeat(np.arange(len(row_groups)), [len(one) for one in places])
        self._blobs = [row_group.path for row_group in row_groups], np.column_stack([numbers, np.concatenate(places)])

    def fetch(self, rows: NDArray[np.int64]) -> Sequence[Row]:
        """The rows with these numbers, with a Blob for image bytes once these are set aside."""
        if self._blobs is None:
            return super().fetch(rows)
        files, places = self._blobs
        dicts = self._frame[rows].to_dicts()
        return [self._with_image(values, files, at) for values, at in zip(dicts, places[rows].tolist(), strict=True)]

    def _with_image(self, values: dict[str, Any], files: list[Path], place: list[int]) -> Row:
        name = (values.pop(self.columns.image, None) or {}).get("path") if self._nested else None
        number, offset, size = place
        image = name if size < 0 else Blob(str(files[number]), offset, size, name or "")
        return {**values, self.columns.image: image}

    def _row_groups(self, folder: Path) -> list[_RowGroup]:
        return [
            _RowGroup(file, group, self.columns.image, self._nested, folder / f"{number:05d}-{group:05d}.bin", num_rows)
            for number, (file, groups) in enumerate(zip(self._files, self._groups, strict=True))
            for group, num_rows in enumerate(groups)
        ]


def _set_aside(row_group: _RowGroup) -> int:
    """Copy one row group's images, some rows at a time; returns the number of rows. A missing image has size -1.

    Raises:
        UserError: the row group is damaged.
    """
    try:
        return _copied(row_group)
    except pa.ArrowException as error:
        raise _unreadable(row_group.file, error) from error


def _copied(row_group: _RowGroup) -> int:
    """Buffered and not "pre-buffered": the latter would hold the whole row group, often gigabytes."""
    offset, places = 0, []
    aside = row_group.path.with_suffix(f".{os.getpid()}.partial")
    column = f"{row_group.column}.bytes" if row_group.nested else row_group.column
    with pq.ParquetFile(row_group.file, buffer_size=_READ_BYTES, pre_buffer=False) as table, aside.open("wb") as file:
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=[row_group.group], columns=[column]):
            values = batch.column(0)
            for value in pc.struct_field(values, "bytes") if row_group.nested else values:
                image = value.as_py()
                places.append((offset, -1 if image is None else len(image)))
                offset += file.write(image or b"")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(row_group.path)
    with aside.open("wb") as file:
        np.save(file, np.asarray(places, dtype=np.int64).reshape(-1, 2))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(row_group.places)
    return len(places)


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _frame(file: Path, table: pq.ParquetFile, names: list[str]) -> pl.DataFrame:
    try:
        frame = pl.from_arrow(table.read(columns=names))
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(file, error) from error
    assert isinstance(frame, pl.DataFrame)
    return frame


def _together(files: Sequence[Path], frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    for file, frame in zip(files, frames, strict=True):
        for name, kind in frame.schema.items():
            if (first := frames[0].schema[name]) != kind:
                raise UserError(f"{file}: its column {name!r:.60} holds {kind}, but {first} in {files[0]}")
    return pl.concat(frames)


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: cannot be read as Parquet ({reason(error)})")


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _holds_binary(kind: pa.DataType) -> bool:
    if _is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return any(_holds_binary(kind.field(i).type) for i in range(kind.num_fields)) if pa.types.is_nested(kind) else False


def _class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    """The names of the label's classes, where the file tells them as the datasets library writes them."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _fingerprint(files: Sequence[Path]) -> str:
    """A hash of the footers, which hold sizes, places and statistics of every column, and of the sizes of the files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(-8, os.SEEK_END) + 8
            footer = int.from_bytes(file.read(4), "little")
            file.seek(size - 8 - footer)
            digest.update(size.to_bytes(8, "little") + file.read(footer))
    return digest.hexdigest()
