"""Which entries of the pair matrix count, and how much: weights in log space, applied tile by tile."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_FEW = 8  # equal keys are listed up to so many a row on average; beyond, tiles compare the keys themselves


class EntryWeights(ABC):
    """Constant weights of the entries of a pair matrix; weight 0 leaves an entry out."""

    @abstractmethod
    def add_logs(self, logits: Float[Tensor, "r c"], tile: Float[Tensor, "r c"], rows: slice, columns: slice) -> None:
        """Add the logarithms of the weights to `logits` of a tile in place; `tile` holds its similarities."""

    def multiply(self, values: Float[Tensor, "r c"], tile: Float[Tensor, "r c"], rows: slice, columns: slice) -> None:
        """Multiply `values` of a tile by the weights in place."""
        logs = torch.zeros_like(values)
        self.add_logs(logs, tile, rows, columns)
        values.mul_(logs.exp_())


class EqualKeys(EntryWeights):
    """Entries whose row and column carry the same key: left out, or (`keep`) the only ones that count.

    The usual few (a pair with itself, a repeated caption) are listed once, by sorting; where there are many (labels of
    a few classes) each tile compares its keys.
    """

    def __init__(self, row_keys: Int64[Tensor, " rows"], column_keys: Int64[Tensor, " columns"], *, keep: bool = False):
        self.row_keys, self.column_keys, self.keep = row_keys, column_keys, keep
        self.listed = _list_equal(row_keys, column_keys)

    def add_logs(self, logits: Tensor, tile: Tensor, rows: slice, columns: slice) -> None:  # noqa: D102, ARG002
        self._fill(logits, rows, columns, float("-inf"))

    def multiply(self, values: Tensor, tile: Tensor, rows: slice, columns: slice) -> None:  # noqa: D102, ARG002
        self._fill(values, rows, columns, 0.0)

    def _fill(self, values: Tensor, rows: slice, columns: slice, left_out: float) -> None:
        if self.listed is None:
            equal = self.row_keys[rows, None] == self.column_keys[None, columns]
            values.masked_fill_(~equal if self.keep else equal, left_out)
            return
        listed_rows, listed_columns = self.listed
        bounds = torch.tensor([rows.start, rows.stop], device=listed_rows.device)
        first, last = torch.searchsorted(listed_rows, bounds).tolist()
        i, j = listed_rows[first:last] - rows.start, listed_columns[first:last] - columns.start
        is_inside = (j >= 0) & (j < columns.stop - columns.start)
        i, j = i[is_inside], j[is_inside]
        if self.keep:
            listed_values = values[i, j]
            values.fill_(left_out)
            values[i, j] = listed_values
        else:
            values[i, j] = left_out


class AtLeast(EntryWeights):
    """Entries whose similarity reaches their row's (or column's) threshold."""

    def __init__(self, thresholds: Float[Tensor, " lines"], *, by_column: bool = False) -> None:
        self._thresholds, self._by_column = thresholds, by_column

    def add_logs(self, logits: Tensor, tile: Tensor, rows: slice, columns: slice) -> None:  # noqa: D102
        least = self._thresholds[None, columns] if self._by_column else self._thresholds[rows, None]
        logits.masked_fill_(tile < least, float("-inf"))


def _list_equal(row_keys: Tensor, column_keys: Tensor) -> tuple[Tensor, Tensor] | None:
    """All (row, column) of equal keys, sorted by row; None where there are many."""
    ordered, order = column_keys.sort(stable=True)
    first = torch.searchsorted(ordered, row_keys)
    counts = torch.searchsorted(ordered, row_keys, right=True) - first
    total = int(counts.sum())
    if total > _FEW * max(len(row_keys), 1):
        return None
    rows = torch.repeat_interleave(torch.arange(len(row_keys), device=row_keys.device), counts)
    within = torch.arange(total, device=row_keys.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return rows, order[torch.repeat_interleave(first, counts) + within]
