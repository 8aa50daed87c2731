"""Similarities of a few listed pairs, and what becomes of them line by line."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.similarity.tiles import slices

_BLOCK_NUMBERS = 2**20  # of pairs x dim at a time


def listed_similarities(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    row_places: Int64[Tensor, " listed"],
    column_places: Int64[Tensor, " listed"],
) -> Float[Tensor, " listed"]:
    """<rows[i], columns[j]> of each listed (i, j), in at least fp32; differentiable in rows and columns.

    O(listed x dim) operations; beside the gradients of rows and columns, memory is O(listed).
    """
    similarities: Tensor = _Listed.apply(rows, columns, row_places, column_places)
    return similarities


def line_log_sum_exp(
    logits: Float[Tensor, " listed"], lines: Int64[Tensor, " listed"], num_lines: int
) -> Float[Tensor, " lines"]:
    """log sum exp(logits) over those that belong to each line; -inf where none does."""
    largest = logits.new_zeros(num_lines).scatter_reduce(0, lines, logits.detach(), "amax", include_self=False)
    total = logits.new_zeros(num_lines).index_add(0, lines, (logits - largest[lines]).exp())
    # Without the inner choice a line of nothing would have the gradient 0/0.
    some = total != 0
    return torch.where(some, torch.where(some, total, 1.0).log() + largest, float("-inf"))


def line_sums(
    values: Float[Tensor, " listed"], lines: Int64[Tensor, " listed"], num_lines: int
) -> Float[Tensor, " lines"]:
    """The sum of those values that belong to each line."""
    return values.new_zeros(num_lines).index_add(0, lines, values)


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, row_places: Tensor, column_places: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns, row_places, column_places)
        similarities = rows.new_empty(len(row_places), dtype=torch.promote_types(rows.dtype, torch.float32))
        for some in _blocks(row_places, rows):
            similarities[some] = torch.linalg.vecdot(rows[row_places[some]], columns[column_places[some]])
        return similarities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, columns, row_places, column_places = ctx.saved_tensors
        d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for some in _blocks(row_places, rows):
            i, j, factors = row_places[some], column_places[some], gradient[some, None].to(rows.dtype)
            d_rows.index_add_(0, i, factors * columns[j])
            d_columns.index_add_(0, j, factors * rows[i])
        return d_rows, d_columns, None, None


def _blocks(places: Tensor, rows: Tensor) -> list[slice]:
    return list(slices(len(places), max(1, _BLOCK_NUMBERS // max(1, rows.shape[1]))))
