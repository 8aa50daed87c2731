"""The similarity from which on an entry is among the largest of its row, found in blocks of rows."""

import math

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.similarity.entry_weights import EntryWeights
from vlm.similarity.tiles import slices

_BLOCK_ENTRIES, _CUDA_BLOCK_ENTRIES = 2**20, 2**24  # of rows x all columns at a time


@torch.no_grad()
def upper_thresholds(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    fraction: float,
    weights: tuple[EntryWeights, ...] = (),
    *,
    matmul_dtype: torch.dtype | None = None,
) -> Float[Tensor, " rows"]:
    """The value that the largest `fraction` of each row's entries reach, and no other, without gradient.

    Of a row's m entries of a weight other than 0 these are the ceil(share m) largest and all that equal the last of
    them: s_ij >= s_alpha with s_alpha the upper quantile. The threshold lies midway between the last that counts and
    the next lower one, so that another product's rounding moves no entry across; -inf where all count, or none exist.
    Products are of the precision of `matmul_dtype` (None: that of the rows), as the tiles'.
    """
    precise = torch.promote_types(rows.dtype, torch.float32)
    columns = columns.to(matmul_dtype or rows.dtype)
    largest_norm = columns.norm(dim=1).max() if len(columns) else columns.new_zeros(())
    thresholds = rows.new_empty(len(rows), dtype=precise)
    everything = slice(0, len(columns))
    at_a_time = _CUDA_BLOCK_ENTRIES if rows.is_cuda else _BLOCK_ENTRIES
    for block in slices(len(rows), max(1, at_a_time // max(1, len(columns)))):
        factors = rows[block].to(columns.dtype)
        similarities = (factors @ columns.T).to(precise)
        for some in weights:
            some.add_logs(similarities, similarities, block, everything)
        last = _last_that_counts(similarities, fraction)
        # Sums of products err in proportion to the factors' lengths, a low-precision result in proportion to itself.
        length = (factors.norm(dim=1) * largest_norm).to(precise)
        rounding = 8 * torch.finfo(precise).eps * length + torch.finfo(columns.dtype).eps * last.abs()
        thresholds[block] = _midway_below(similarities, last, rounding)
    return thresholds


def _last_that_counts(similarities: Tensor, fraction: float) -> Float[Tensor, " rows"]:
    """The ceil(share m)-th largest of the m finite entries of each row; -inf where there are none."""
    present = (similarities > -math.inf).sum(1)
    counts: Int64[Tensor, " rows"] = (fraction * present.double() - 1e-9).ceil().long()  # 0.07 x 100 are 7, not 8
    if not similarities.numel():
        return similarities.new_full((len(similarities),), -math.inf)
    return torch.where(counts > 0, _nth_largest(similarities, counts.clamp(min=1)), -math.inf)


def _nth_largest(values: Float[Tensor, "rows columns"], counts: Int64[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Of each row the value that is `counts`-th from above, by selection; rows differ in few counts."""
    places = values.shape[1] - counts
    if values.device.type == "cpu":  # numpy selects about ten times as fast as torch
        selected = np.partition(values.numpy(), places.unique().tolist(), axis=1)
        return torch.from_numpy(selected).gather(1, places[:, None])[:, 0]
    values_of_rows = values.new_empty(len(values))
    for place in places.unique().tolist():
        rows = (places == place).nonzero()[:, 0]
        values_of_rows[rows] = values[rows].kthvalue(place + 1, dim=1).values
    return values_of_rows


def _midway_below(similarities: Tensor, last: Tensor, rounding: Tensor) -> Float[Tensor, " rows"]:
    lower = similarities.masked_fill_(similarities >= (last - rounding)[:, None], -math.inf).amax(1)
    return (last + lower) / 2
