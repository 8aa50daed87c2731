"""Log-sum-exp and mean similarity of each row and column under a scale of its own, from one product."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.similarity.collectives import RowGroup
from vlm.similarity.entries import EntryWeights
from vlm.similarity.tiles import Columns, TileKernel, reduce_tiles

Weights = tuple[EntryWeights, ...]


class SoftmaxStatistics(NamedTuple):
    """Of each line with scale u: log sum_j w_j exp(u z_j), and sum_j P_j z_j with P its softmax.

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
    product: torch.dtype | None = None,
) -> tuple[SoftmaxStatistics, SoftmaxStatistics]:
    """The statistics of each own row over all columns, and of each own column over the rows of all ranks.

    `columns` are the rows of all `ranks`; `scales` are of the own rows and of all columns, and constants. Weights see
    plain similarities. Differentiable in rows and columns. Collective.
    """
    kernel = _Statistics(weights, (scales[0].detach(), scales[1].detach()))
    row_logs, row_means, parts, means = reduce_tiles(kernel, rows, columns, product=product)
    own = ranks.merge_log_sum_exp(parts)
    means = means.detach()
    if ranks.size > 1:
        total = ranks.gather_constant(own)
        share = (parts.detach() - total.masked_fill(total.isneginf(), 0.0)).exp()
        means = ranks.sum_to_owners(share * means)
    return SoftmaxStatistics(row_logs, row_means.detach()), SoftmaxStatistics(own, means)


class _Statistics(TileKernel):
    """Two logits an entry, that of its row and that of its column; only log-sum-exps have gradients."""

    def __init__(self, weights: Weights, scales: tuple[Tensor, Tensor]) -> None:
        self._weights, self._scales = weights, scales

    def begin(self, like: Tensor) -> None:
        self._row, self._column = (_Line(len(scale), like) for scale in self._scales)

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        of_rows, of_columns = self._logits(tile, rows, columns)
        self._row.add(of_rows, tile, rows, dim=1)
        self._column.add(of_columns, tile, columns, dim=0)

    def finish(self) -> tuple[Tensor, ...]:
        results = (*self._row.results(), *self._column.results())
        # No entry: probability exp(-inf) = 0.
        self._references = tuple(logs.masked_fill(logs.isneginf(), float("inf")) for logs in results[::2])
        return results

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        self._factors = tuple(gradient * scale for gradient, scale in zip(gradients[::2], self._scales, strict=True))

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        of_rows, of_columns = self._logits(tile, rows, columns)
        of_rows.sub_(self._references[0][rows, None]).exp_().mul_(self._factors[0][rows, None])
        return of_rows.addcmul_(
            of_columns.sub_(self._references[1][None, columns]).exp_(), self._factors[1][None, columns]
        )

    def _logits(self, tile: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        of_rows = tile * self._scales[0][rows, None]
        of_columns = tile * self._scales[1][None, columns]
        for some in self._weights:
            some.add_logs(of_rows, tile, rows, columns)
            some.add_logs(of_columns, tile, rows, columns)
        return of_rows, of_columns


class _Line:
    """Sums of exponentials, plain and times the similarity, against a reference that follows the largest logit."""

    def __init__(self, size: int, like: Tensor) -> None:
        self._reference = like.new_full((size,), torch.finfo(like.dtype).min)
        self._total, self._weighted = like.new_zeros(size), like.new_zeros(size)

    def add(self, logits: Tensor, tile: Tensor, lines: slice, dim: int) -> None:
        """Add a tile to its lines; the logits are overwritten."""
        old = self._reference[lines]
        new = torch.maximum(old, logits.amax(dim))
        exponentials = logits.sub_(new.unsqueeze(dim)).exp_()
        decay = (old - new).exp()
        self._total[lines] = self._total[lines] * decay + exponentials.sum(dim)
        self._weighted[lines] = self._weighted[lines] * decay + torch.linalg.vecdot(exponentials, tile, dim=dim)
        self._reference[lines] = new

    def results(self) -> tuple[Tensor, Tensor]:
        means = torch.where(self._total == 0, 0.0, self._weighted / self._total)
        return self._reference + self._total.log(), means
