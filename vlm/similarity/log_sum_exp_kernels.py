"""Log-sum-exps over rows and columns of tiles: exponentials summed, and the derivative when they are made again."""

import math

import torch
from torch import Tensor

from vlm.similarity.entry_weights import EntryWeights
from vlm.similarity.tiles import Scratch, TileKernel

Weights = tuple[EntryWeights, ...]

_MARGIN = 2.0**30  # how far each sum has to be above what may be missing in it
_LOG2E = math.log2(math.e)  # powers of 2 take a third of exp's time on CPUs


class LogSumExp(TileKernel):
    """Row and column statistics of logits that are the tile itself.

    With a reference for all, one exponential serves both directions; else each has its own running maximum.
    """

    def __init__(
        self,
        weights: tuple[Weights, Weights],
        sizes: tuple[int, int],
        reference: float | None,
        *,
        with_columns: bool = True,
    ) -> None:
        self._row_weights, self._column_weights = weights
        self._sizes = sizes
        self._with_columns = with_columns
        self._same_weights = weights[0] is weights[1] or not with_columns
        self._reference = reference if self._same_weights else None
        self._spare = Scratch()

    def begin(self, like: Tensor) -> None:  # noqa: D102
        num_rows, num_columns = self._sizes
        self._row = _Running(num_rows, like, 1, self._reference)
        self._column = _Running(num_columns if self._with_columns else 0, like, 0, self._reference)

    def lost_digits(self) -> bool:
        """Whether a line's sum is so small that it misses something of weight."""
        num_rows, num_columns = self._sizes
        return self._row.lost_digits(num_columns) or self._column.lost_digits(num_rows)

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:  # noqa: D102
        if self._reference is not None:
            values = self._exponentials(tile, rows, columns)
            self._row.total[rows] += values.sum(1)
            if self._with_columns:
                self._column.total[columns] += values.sum(0)
            return
        row_logits, column_logits = self._logits(tile, rows, columns)
        if self._with_columns:
            self._column.add(column_logits, columns, self._spare.like(tile))
        self._row.add(row_logits, rows, row_logits)

    def finish(self) -> tuple[Tensor, ...]:  # noqa: D102
        results = (self._row.log_sum_exp(), self._column.log_sum_exp())
        return results if self._with_columns else results[:1]

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:  # noqa: D102
        self._row.begin_backward(gradients[0])
        if self._with_columns:
            self._column.begin_backward(gradients[1])

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:  # noqa: D102
        if self._reference is not None:
            values, factors = self._exponentials(tile, rows, columns), self._row.factors(rows)
            return values.mul_(factors + self._column.factors(columns) if self._with_columns else factors)
        row_logits, column_logits = self._logits(tile, rows, columns)
        if not self._with_columns:
            return self._row.softmax(row_logits, rows, row_logits).mul_(self._row.factors(rows))
        column_gradient = self._column.softmax(column_logits, columns, self._spare.like(tile)).mul_(
            self._column.factors(columns)
        )
        return column_gradient.addcmul_(self._row.softmax(row_logits, rows, row_logits), self._row.factors(rows))

    def _exponentials(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        if not _are_factors(self._row_weights):
            return self._row.softmax(_weighed(tile, tile, self._row_weights, rows, columns), rows, tile)
        values = self._row.softmax(tile, rows, tile)
        for weights in self._row_weights:
            weights.multiply(values, values, rows, columns)
        return values

    def _logits(self, tile: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The logits that rows and columns sum up: the tile; for columns the spare one where their weights differ."""
        column_logits = tile
        if not self._same_weights:
            column_logits = _weighed(self._spare.like(tile).copy_(tile), tile, self._column_weights, rows, columns)
        return _weighed(tile, tile, self._row_weights, rows, columns), column_logits


def _are_factors(weights: Weights) -> bool:
    """Whether all of them multiply values without going through logarithms."""
    return all(type(some).multiply is not EntryWeights.multiply for some in weights)


def _weighed(logits: Tensor, tile: Tensor, weights: Weights, rows: slice, columns: slice) -> Tensor:
    for some in weights:
        some.add_logs(logits, tile, rows, columns)
    return logits


class _Running:
    """Sums of exponentials over a dimension, against a reference that follows the largest logit, or is one number.

    Reference and sum stay apart: their logarithm is large where logits are, and its rounding would be in each softmax.
    """

    def __init__(self, size: int, like: Tensor, dim: int, fixed: float | None) -> None:
        lowest = torch.finfo(like.dtype).min / 2  # finite to base 2 as well
        self._fixed = fixed
        self._reference = like.new_full((size,), lowest if fixed is None else fixed)
        self._dim = dim
        self.total = like.new_zeros(size)

    def add(self, logits: Tensor, lines: slice, out: Tensor) -> None:
        """Add a tile's logits to its lines; `out`, which may be the logits, is overwritten."""
        reference, total = self._reference[lines], self.total[lines]
        new = torch.maximum(reference, logits.amax(self._dim))
        total *= (reference - new).exp()
        reference.copy_(new)
        total += self.softmax(logits, lines, out).sum(self._dim)

    def lost_digits(self, entries: int) -> bool:
        """Whether a sum is so near to the smallest numbers that what vanished of its `entries` may matter."""
        if not self._fixed or not len(self.total):
            return False
        least = torch.finfo(self.total.dtype).tiny * _MARGIN * max(entries, 1)
        return bool(self.total.min() < least)

    def log_sum_exp(self) -> Tensor:
        """The result; -inf where nothing was added."""
        return self._reference + self.total.log()

    def softmax(self, logits: Tensor, lines: slice, out: Tensor) -> Tensor:
        """exp(logits - reference) of a tile in `out`, in one pass and the power of 2; a softmax but for the sum."""
        if self._fixed == 0.0:
            return torch.mul(logits, _LOG2E, out=out).exp2_()
        reference = (self._reference[lines] * -_LOG2E).unsqueeze(self._dim)
        return torch.add(reference, logits, alpha=_LOG2E, out=out).exp2_()

    def begin_backward(self, gradient: Tensor) -> None:
        """Take the gradient of the result; what nothing was added to has none."""
        self._factors = torch.where(self.total == 0, 0.0, gradient / self.total)

    def factors(self, lines: slice) -> Tensor:
        """Gradient over sum of each line, as a column or as a row."""
        return self._factors[lines].unsqueeze(self._dim)
