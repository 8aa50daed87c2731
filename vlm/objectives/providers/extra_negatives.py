"""The two shapes of extra negatives: columns that all rows share, and a set for each row that is built in blocks."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import softplus

from vlm.objectives.pairs import ExtraNegatives, Pairs
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.log_sum_exp import row_log_sum_exp
from vlm.similarity.softplus_sum import softplus_sum
from vlm.similarity.tiles import Columns, slices

_BLOCK_NUMBERS, _CUDA_BLOCK_NUMBERS = 1 << 22, 1 << 24  # of one block of rows' own negatives
_LINEAR_FROM = 40.0  # log(1 + exp(z)) is z there, to the last bit of float64


class SharedNegatives(ExtraNegatives):
    """Columns that all rows are compared with, but for those made of the row's own sample.

    `column_ids` names the sample of each column, or each of the samples that it was made of. The columns go through
    the tiles of the pair matrix: memory is O((rows + columns) dim).
    """

    def __init__(
        self, pairs: Pairs, columns: Mapping[str, Tensor], column_ids: tuple[Int64[Tensor, " columns"], ...]
    ) -> None:
        self._columns = {kind: Columns(rows.detach()) for kind, rows in columns.items()}
        self._row_ids, self._column_ids = pairs.ids, column_ids
        self._matmul_dtype = pairs.matmul_dtype

    def num_columns(self, others: str) -> Int64[Tensor, " rows"]:  # noqa: D102
        left_out = torch.zeros_like(self._row_ids)
        for place, ids in enumerate(self._column_ids):
            counted = torch.ones_like(ids, dtype=torch.bool)
            for earlier in self._column_ids[:place]:
                counted &= ids != earlier
            left_out += num_equal(self._row_ids, ids[counted])
        return self._columns[others].num_columns - left_out

    def log_sum_exp(self, queries: Tensor, others: str, scale: Tensor) -> Tensor:  # noqa: D102
        return row_log_sum_exp(
            queries, self._columns[others], scale, self._other_samples, matmul_dtype=self._matmul_dtype
        )

    def softplus_sum(self, queries: Tensor, others: str, scale: Tensor, bias: Tensor) -> Tensor:  # noqa: D102
        return softplus_sum(
            queries, self._columns[others], scale, bias, self._other_samples, matmul_dtype=self._matmul_dtype
        )

    @cached_property
    def _other_samples(self) -> tuple[EqualKeys, ...]:
        return tuple(EqualKeys(self._row_ids, ids) for ids in self._column_ids)


class OwnNegatives(ExtraNegatives):
    """A set of negatives for each row, built in blocks of rows and forgotten: rows x negatives x dim is never there.

    Negatives are constants, so a block's gradient is known with its value: what lasts for the backward pass is one
    vector a row, the mean of its negatives under their softmax, or their sum under their sigmoids.
    """

    @abstractmethod
    def block_negatives(self, rows: slice, others: str) -> Float[Tensor, "block negatives dim"]:
        """The negatives of a block of rows, without gradient; finite also for a row that has none."""

    def log_sum_exp(self, queries: Tensor, others: str, scale: Tensor) -> Tensor:  # noqa: D102
        scaled = queries * scale[:, None]
        values, slopes, _ = self._in_blocks(scaled, scaled.new_zeros(()), others, _log_sum_exp)
        values = values + (slopes * (scaled - scaled.detach())).sum(1)
        return torch.where(self.num_columns(others) > 0, values, float("-inf"))

    def softplus_sum(self, queries: Tensor, others: str, scale: Tensor, bias: Tensor) -> Tensor:  # noqa: D102
        scaled = queries * scale
        values, slopes, totals = self._in_blocks(scaled, bias, others, _softplus_sum)
        values = values + (slopes * (scaled - scaled.detach())).sum(1) + totals * (bias - bias.detach())
        return torch.where(self.num_columns(others) > 0, values, 0.0)

    @torch.no_grad()
    def _in_blocks(
        self, scaled: Tensor, bias: Tensor, others: str, reduce: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows dim"], Float[Tensor, " rows"]]:
        """The values of `reduce` of the rows' logits, their derivatives by the rows, and by the bias."""
        values, slopes, totals = scaled.new_zeros(len(scaled)), torch.zeros_like(scaled), scaled.new_zeros(len(scaled))
        if not len(scaled):
            return values, slopes, totals
        width = max(int(self.num_columns(others).amax()), 1) * scaled.shape[1]
        numbers = _CUDA_BLOCK_NUMBERS if scaled.is_cuda else _BLOCK_NUMBERS
        for rows in slices(len(scaled), max(numbers // width, 1)):
            negatives = self.block_negatives(rows, others)
            logits = (negatives @ scaled[rows, :, None])[:, :, 0] + bias
            values[rows], derivatives = reduce(logits)
            slopes[rows] = (derivatives[:, None, :] @ negatives)[:, 0, :]
            totals[rows] = derivatives.sum(1)
        return values, slopes, totals


def _log_sum_exp(logits: Float[Tensor, "r c"]) -> tuple[Float[Tensor, " r"], Float[Tensor, "r c"]]:
    return logits.logsumexp(1), logits.softmax(1)


def _softplus_sum(logits: Float[Tensor, "r c"]) -> tuple[Float[Tensor, " r"], Float[Tensor, "r c"]]:
    return softplus(logits, threshold=_LINEAR_FROM).sum(1), logits.sigmoid()


def num_equal(row_keys: Int64[Tensor, " rows"], column_keys: Int64[Tensor, " columns"]) -> Int64[Tensor, " rows"]:
    """How many columns carry each row's key, without a matrix of both."""
    ordered = column_keys.sort().values
    return torch.searchsorted(ordered, row_keys, right=True) - torch.searchsorted(ordered, row_keys)
