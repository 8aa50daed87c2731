"""Tables of image and captions, whatever they were read from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.convert.entry import ColumnRoles, Row
from data.pools.base import Pool
from data.samples.bad_sample import BadSampleError


class SourceTable(ABC):
    """Rows by number. `fingerprint` changes when the table does; `left_out` names columns that no json can hold.

    `class_names` are those that the table itself knows for its class numbers.
    """

    def __init__(self, columns: ColumnRoles, fingerprint: str, left_out: tuple[str, ...] = ()) -> None:
        self.columns = columns
        self.fingerprint = fingerprint
        self.left_out = left_out
        self.class_names: tuple[str, ...] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image_paths(self) -> pl.Series | None:
        """The image column of all rows; None where the images are bytes in the table."""

    @abstractmethod
    def labels(self) -> Iterable[Any]:
        """Every value of the label column, at least once."""

    @abstractmethod
    def fetch(self, rows: NDArray[np.int64]) -> Sequence[Row]:
        """The rows with these numbers, in this order."""

    def prepare(self, folder: Path, processes: Pool, report: Callable[[int, int], None]) -> None:  # noqa: B027
        """Set aside in `folder` what `fetch` will point to; `report` gets the numbers of rows done and in all."""


class FrameTable(SourceTable):
    """A table held as columns."""

    def __init__(
        self, frame: pl.DataFrame, columns: ColumnRoles, fingerprint: str, problems: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(columns, fingerprint)
        self._frame = frame
        self._problems = problems or {}

    def __len__(self) -> int:
        return len(self._frame)

    def image_paths(self) -> pl.Series | None:
        """The image column; a row that cannot be used is of no image, so that it is reported as a row of its own."""
        paths = self._frame[self.columns.image]
        return paths.scatter(list(self._problems), None) if self._problems else paths

    def labels(self) -> Iterable[Any]:
        """The distinct values of the label column, as far as a column of its type can be labels."""
        column = self._frame[str(self.columns.label)]
        return column[:1].to_list() if column.dtype.is_nested() else column.unique(maintain_order=True).to_list()

    def fetch(self, rows: NDArray[np.int64]) -> Sequence[Row]:
        """The rows with these numbers."""
        dicts = self._frame[rows].to_dicts()
        return [
            BadSampleError(self._problems[row]) if row in self._problems else values
            for row, values in zip(rows.tolist(), dicts, strict=True)
        ]


class ListTable(SourceTable):
    """A table of a few hundred thousand rows at most, held as it is; its image column is text in every row."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: ColumnRoles, fingerprint: str) -> None:
        super().__init__(columns, fingerprint)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def image_paths(self) -> pl.Series | None:
        """The image column."""
        return text_series(row.get(self.columns.image) for row in self._rows)

    def labels(self) -> Iterable[Any]:
        """The label column."""
        return (row.get(str(self.columns.label)) for row in self._rows)

    def fetch(self, rows: NDArray[np.int64]) -> Sequence[Row]:
        """The rows with these numbers."""
        return [self._rows[row] for row in rows.tolist()]


def text_series(values: Any) -> pl.Series:
    """A column of text to tell values apart, null where a value is none; polars takes no halves of surrogate pairs."""
    return pl.Series("path", [_as_utf8(value) if isinstance(value, str) else None for value in values], dtype=pl.String)


def _as_utf8(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


class Groups:
    """The rows of each sample: those that name the same image are one, in the place of the first."""

    def __init__(self, paths: pl.Series | None, num_rows: int) -> None:
        self._rows = np.arange(num_rows)
        self._starts = self._rows
        if paths is None or paths.drop_nulls().is_unique().all():
            return
        first = pl.when(pl.col("path").is_null()).then(pl.col("row")).otherwise(pl.col("row").min().over("path"))
        frame = pl.DataFrame({"path": paths, "row": self._rows})
        firsts = frame.select(first.alias("first"))["first"].to_numpy()
        self._rows = np.argsort(firsts, kind="stable")
        self._starts = np.flatnonzero(np.diff(firsts[self._rows], prepend=-1))

    def __len__(self) -> int:
        return len(self._starts)

    def rows(self, sample: int) -> NDArray[np.int64]:
        """The rows of one sample, in the table's order."""
        stop = self._starts[sample + 1] if sample + 1 < len(self._starts) else len(self._rows)
        return self._rows[self._starts[sample] : stop]
