"""The rows of all ranks summed by key: what a mean over many positives is a product with, without any pair matrix."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed.row_group import RowGroup


def group_sums(
    rows: Float[Tensor, "rows dim"],
    keys: Int64[Tensor, " rows"],
    queries: Int64[Tensor, " queries"],
    ranks: RowGroup,
) -> tuple[Float[Tensor, "queries dim"], Int64[Tensor, " queries"]]:
    """For each key in `queries` the sum and the number of all ranks' rows with that key.

    Every one of them is that of some row. Differentiable in rows. O(N D) operations; a collective that sums [K, D]
    numbers over ranks for K keys, in both passes.
    """
    known, places, counts = ranks.gather_constant(keys).unique(return_inverse=True, return_counts=True)
    sums = rows.new_zeros(len(known), rows.shape[1]).index_add(0, places[ranks.local], rows)
    at = torch.searchsorted(known, queries)
    return ranks.sum(sums)[at], counts[at]
