"""Clusters of the rows of all ranks, and the weights of entries that share them."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed.row_group import RowGroup
from vlm.similarity.entry_weights import EntryWeights
from vlm.similarity.tiles import slices

_BLOCK = 4096  # rows x all centres at a time


@torch.no_grad()
def spherical_k_means(
    rows: Float[Tensor, "all dim"],
    ranks: RowGroup,
    keys: Float[Tensor, " all"],
    count: int,
    iterations: int,
) -> Int64[Tensor, " all"]:
    """The cluster, below `count`, of each unit row of all ranks; the same on each rank.

    The rows of the smallest keys are the first centres. Each rank assigns its own rows; centres are normalised sums. An
    iteration sends count x dim numbers a rank, the end N labels. With as many clusters as rows each row is its own.
    Collective.
    """
    if count >= len(rows):
        return torch.arange(len(rows), device=rows.device)
    local = rows[ranks.local]
    centres = rows[keys.argsort(stable=True)[:count]]
    for _ in range(iterations):
        sums = ranks.sum(torch.zeros_like(centres).index_add(0, _nearest(local, centres), local))
        norms = sums.norm(dim=1, keepdim=True)
        centres = torch.where(norms > 0, sums / norms, centres)  # an empty cluster stays where it was
    return ranks.gather_constant(_nearest(local, centres))


class ClustersApart(EntryWeights):
    """In how many of R clusterings an entry's row and column are apart; 0, left out, where in none."""

    def __init__(self, row_labels: Int64[Tensor, "rows R"], column_labels: Int64[Tensor, "columns R"]) -> None:
        self._row_labels, self._column_labels = row_labels, column_labels

    def add_logs(self, logits: Tensor, tile: Tensor, rows: slice, columns: slice) -> None:  # noqa: D102, ARG002
        logits.add_(self._counts(logits, rows, columns).log_())

    def multiply(self, values: Tensor, tile: Tensor, rows: slice, columns: slice) -> None:  # noqa: D102, ARG002
        values.mul_(self._counts(values, rows, columns))

    def _counts(self, like: Tensor, rows: slice, columns: slice) -> Tensor:
        counts = torch.zeros_like(like)
        for labels, other_labels in zip(self._row_labels[rows].T, self._column_labels[columns].T, strict=True):
            counts += labels[:, None] != other_labels[None, :]
        return counts


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    labels = [(rows[block] @ centres.T).argmax(1) for block in slices(len(rows), _BLOCK)]
    return torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64, device=rows.device)
