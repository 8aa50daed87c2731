"""The columns that are nearest to each row, found in blocks of rows."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.similarity.entry_weights import EntryWeights
from vlm.similarity.tiles import slices

ROW_BLOCK = 256  # rows x all columns at a time


@torch.no_grad()
def top_negatives(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    count: int,
    weights: tuple[EntryWeights, ...] = (),
) -> tuple[Float[Tensor, "rows count"], Int64[Tensor, "rows count"]]:
    """The `count` largest similarities of each row and their columns, largest first, without gradient.

    Entries of weight 0 do not count. Where fewer are left, similarities are -inf. With fewer columns than `count`, all.
    """
    count = min(count, len(columns))
    values, places = rows.new_empty(len(rows), count), rows.new_empty(len(rows), count, dtype=torch.int64)
    for block in slices(len(rows), ROW_BLOCK):
        similarities = rows[block] @ columns.T
        everything = slice(0, len(columns))
        for some in weights:
            some.add_logs(similarities, similarities, block, everything)
        values[block], places[block] = similarities.topk(count, dim=1)
    return values, places
