"""Mean similarities of rows and columns under a softmax of the similarities themselves, with their log-sum-exps.

`softmax_means` has one sharpness and gradients everywhere; `softmax_statistics` a scale for each row and column, and
gradients through the log-sum-exps alone. Both need one product.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.distributed.row_group import RowGroup
from vlm.similarity.entry_weights import EntryWeights
from vlm.similarity.tiles import Columns, TileKernel, reduce_tiles

Weights = tuple[EntryWeights, ...]


@dataclass(frozen=True)
class Softmax:
    """P_ij = w_ij exp(u z_ij) / sum_j w_ij exp(u z_ij): the sharpness u, the weights w, whether P has no gradient."""

    sharpness: float
    weights: Weights = ()
    constant: bool = False


def softmax_means(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    ranks: RowGroup,
    softmax: Softmax,
    *,
    empty: float = 0.0,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """sum_j P_ij z_ij of each own row over all columns, z_ij = <x_i, y_j>, and of each own column over all rows.

    `columns` are the rows of all `ranks`, of which this rank's own make the second result. A negative sharpness prefers
    small similarities. `empty` is the mean where no entry counts. Differentiable in rows and columns. Collective.
    """
    kernel = _SoftmaxMean((len(rows), columns.num_columns), softmax)
    row_means, row_logs, column_part, logs = reduce_tiles(kernel, rows, columns, matmul_dtype=matmul_dtype)
    column_means, column_logs = _merge(ranks, column_part, logs.detach() if softmax.constant else logs)
    return (
        row_means.masked_fill(row_logs.isneginf(), empty),
        column_means.masked_fill(column_logs.isneginf(), empty),
    )


def _merge(ranks: RowGroup, means: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """The means over all ranks' parts, and the log-sum-exps that say how much each rank's part counts."""
    if ranks.size == 1:
        return means, logs
    merged = ranks.merge_log_sum_exp(logs)
    total = ranks.gather(merged)
    weight = (logs - total.masked_fill(total.isneginf(), 0.0)).exp()
    return ranks.sum_to_owners(weight * means), merged


class _SoftmaxMean(TileKernel):
    """Row means and log-sum-exps, column means and log-sum-exps.

    d L / d z_ij = u P_ij and d m / d z_ij = P_ij (1 + u (z_ij - m)) of row L and m, and of the column's.
    """

    def __init__(self, sizes: tuple[int, int], softmax: Softmax) -> None:
        self._sizes, self._softmax = sizes, softmax

    def begin(self, like: Tensor) -> None:
        self._lines = tuple(_RunningMean(size, like) for size in self._sizes)

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        logits = self._logits(tile, rows, columns)
        self._lines[0].add(logits, tile, rows, dim=1)
        self._lines[1].add(logits, tile, columns, dim=0)

    def finish(self) -> tuple[Tensor, ...]:
        self._results = tuple(line.result() for line in self._lines)
        return self._results[0] + self._results[1]

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        # No entry: probability exp(-inf) = 0.
        self._references = tuple(logs.masked_fill(logs.isneginf(), float("inf")) for _, logs in self._results)
        # d z_ij = P_ij (slope z_ij + level), of the row and of the column
        factors = []
        for (means, _), mean_gradient, log_gradient in zip(self._results, gradients[::2], gradients[1::2], strict=True):
            if self._softmax.constant:
                factors.append((torch.zeros_like(mean_gradient), mean_gradient))
            else:
                slope = self._softmax.sharpness * mean_gradient
                factors.append((slope, mean_gradient + self._softmax.sharpness * log_gradient - slope * means))
        self._factors = factors

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        logits = self._logits(tile, rows, columns)
        (row_slope, row_level), (column_slope, column_level) = self._factors
        column_gradient = tile * column_slope[None, columns] + column_level[None, columns]
        column_gradient.mul_((logits - self._references[1][None, columns]).exp_())
        row_gradient = tile.mul_(row_slope[rows, None]).add_(row_level[rows, None])
        row_gradient.mul_(logits.sub_(self._references[0][rows, None]).exp_())
        return row_gradient.add_(column_gradient)

    def _logits(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        logits = tile * self._softmax.sharpness
        for some in self._softmax.weights:
            some.add_logs(logits, tile, rows, columns)
        return logits


class SoftmaxStatistics(NamedTuple):
    """log sum_j w_j exp(u z_j) of each line with its scale u, and sum_j P_j z_j with P its softmax.

    Where no entry counts they are -inf and 0. The mean carries no gradient.
    """

    log_sum_exp: Float[Tensor, " rows"]
    mean: Float[Tensor, " rows"]


def softmax_statistics(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    ranks: RowGroup,
    scales: tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]],
    weights: Weights = (),
    *,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[SoftmaxStatistics, SoftmaxStatistics]:
    """The statistics of each own row over all columns, and of each own column over the rows of all ranks.

    `columns` are the rows of all `ranks`; `scales` are of the own rows and of all columns, and constants. Weights see
    plain similarities. Differentiable in rows and columns. Collective.
    """
    kernel = _Statistics(weights, (scales[0].detach(), scales[1].detach()))
    row_logs, row_means, column_part, means = reduce_tiles(kernel, rows, columns, matmul_dtype=matmul_dtype)
    column_logs = ranks.merge_log_sum_exp(column_part)
    means = means.detach()
    if ranks.size > 1:
        total = ranks.gather_constant(column_logs)
        weight = (column_part.detach() - total.masked_fill(total.isneginf(), 0.0)).exp()
        means = ranks.sum_to_owners(weight * means)
    return SoftmaxStatistics(row_logs, row_means.detach()), SoftmaxStatistics(column_logs, means)


class _Statistics(TileKernel):
    """Two logits an entry, that of its row and that of its column; only log-sum-exps have gradients."""

    def __init__(self, weights: Weights, scales: tuple[Tensor, Tensor]) -> None:
        self._weights, self._scales = weights, scales

    def begin(self, like: Tensor) -> None:
        self._row, self._column = (_RunningMean(len(scale), like) for scale in self._scales)

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        row_logits, column_logits = self._logits(tile, rows, columns)
        self._row.add(row_logits, tile, rows, dim=1, overwrite=True)
        self._column.add(column_logits, tile, columns, dim=0, overwrite=True)

    def finish(self) -> tuple[Tensor, ...]:
        results = tuple(result for line in (self._row, self._column) for result in reversed(line.result()))
        # No entry: probability exp(-inf) = 0.
        self._references = tuple(logs.masked_fill(logs.isneginf(), float("inf")) for logs in results[::2])
        return results

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        self._factors = tuple(gradient * scale for gradient, scale in zip(gradients[::2], self._scales, strict=True))

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        row_logits, column_logits = self._logits(tile, rows, columns)
        row_logits.sub_(self._references[0][rows, None]).exp_().mul_(self._factors[0][rows, None])
        return row_logits.addcmul_(
            column_logits.sub_(self._references[1][None, columns]).exp_(), self._factors[1][None, columns]
        )

    def _logits(self, tile: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        row_logits = tile * self._scales[0][rows, None]
        column_logits = tile * self._scales[1][None, columns]
        for some in self._weights:
            some.add_logs(row_logits, tile, rows, columns)
            some.add_logs(column_logits, tile, rows, columns)
        return row_logits, column_logits


class _RunningMean:
    """Sums of exponentials, plain and times a value, against a reference that follows the largest logit so far."""

    def __init__(self, size: int, like: Tensor) -> None:
        self._reference = like.new_full((size,), torch.finfo(like.dtype).min)
        self._total, self._weighted = like.new_zeros(size), like.new_zeros(size)

    def add(self, logits: Tensor, values: Tensor, lines: slice, dim: int, *, overwrite: bool = False) -> None:
        """Add a tile to its lines; with `overwrite` the logits are not needed any more."""
        old = self._reference[lines]
        new = torch.maximum(old, logits.amax(dim))
        shifted = logits.sub_(new.unsqueeze(dim)) if overwrite else logits - new.unsqueeze(dim)
        exponentials = shifted.exp_()
        decay = (old - new).exp()
        self._total[lines] = self._total[lines] * decay + exponentials.sum(dim)
        self._weighted[lines] = self._weighted[lines] * decay + torch.linalg.vecdot(exponentials, values, dim=dim)
        self._reference[lines] = new

    def result(self) -> tuple[Tensor, Tensor]:
        """The means (0 where nothing was added), and the log-sum-exps (there -inf)."""
        means = torch.where(self._total == 0, 0.0, self._weighted / self._total)
        return means, self._reference + self._total.log()
