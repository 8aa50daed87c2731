"""The mean similarity of each row and column under a softmax of the similarities themselves, from one product."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.similarity.collectives import RowGroup
from vlm.similarity.entries import EntryWeights
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
    product: torch.dtype | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Of each own row sum_j P_ij z_ij over all columns, z_ij = <x_i, y_j>; of each own column the same over all rows.

    `columns` are the rows of all `ranks`, of which this rank's own make the second result. A negative sharpness prefers
    small similarities. `empty` is the mean where no entry counts. Differentiable in rows and columns. Collective.
    """
    kernel = _SoftmaxMean((len(rows), columns.num_columns), softmax)
    row_means, row_logs, parts, logs = reduce_tiles(kernel, rows, columns, product=product)
    column_means, column_logs = _merge(ranks, parts, logs.detach() if softmax.constant else logs)
    return (
        row_means.masked_fill(row_logs.isneginf(), empty),
        column_means.masked_fill(column_logs.isneginf(), empty),
    )


def _merge(ranks: RowGroup, means: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """The means over what all ranks found, and the log-sum-exps that say how much each rank's part counts."""
    if ranks.size == 1:
        return means, logs
    own = ranks.merge_log_sum_exp(logs)
    total = ranks.gather(own)
    share = (logs - total.masked_fill(total.isneginf(), 0.0)).exp()
    return ranks.sum_to_owners(share * means), own


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
        for (means, _), of_mean, of_logs in zip(self._results, gradients[::2], gradients[1::2], strict=True):
            if self._softmax.constant:
                factors.append((torch.zeros_like(of_mean), of_mean))
            else:
                slope = self._softmax.sharpness * of_mean
                factors.append((slope, of_mean + self._softmax.sharpness * of_logs - slope * means))
        self._factors = factors

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        logits = self._logits(tile, rows, columns)
        (row_slope, row_level), (column_slope, column_level) = self._factors
        of_columns = tile * column_slope[None, columns] + column_level[None, columns]
        of_columns.mul_((logits - self._references[1][None, columns]).exp_())
        of_rows = tile.mul_(row_slope[rows, None]).add_(row_level[rows, None])
        of_rows.mul_(logits.sub_(self._references[0][rows, None]).exp_())
        return of_rows.add_(of_columns)

    def _logits(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        logits = tile * self._softmax.sharpness
        for some in self._softmax.weights:
            some.add_logs(logits, tile, rows, columns)
        return logits


class _RunningMean:
    """Sums of exponentials, plain and times a value, against a reference that follows the largest logit so far."""

    def __init__(self, size: int, like: Tensor) -> None:
        self._reference = like.new_full((size,), torch.finfo(like.dtype).min)
        self._total, self._weighted = like.new_zeros(size), like.new_zeros(size)

    def add(self, logits: Tensor, values: Tensor, lines: slice, dim: int) -> None:
        """Add a tile to its lines."""
        old = self._reference[lines]
        new = torch.maximum(old, logits.amax(dim))
        exponentials = (logits - new.unsqueeze(dim)).exp_()
        decay = (old - new).exp()
        self._total[lines] = self._total[lines] * decay + exponentials.sum(dim)
        self._weighted[lines] = self._weighted[lines] * decay + torch.linalg.vecdot(exponentials, values, dim=dim)
        self._reference[lines] = new

    def result(self) -> tuple[Tensor, Tensor]:
        """The means (0 where nothing was added), and the log-sum-exps (there -inf)."""
        means = torch.where(self._total == 0, 0.0, self._weighted / self._total)
        return means, self._reference + self._total.log()
