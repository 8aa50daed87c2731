"""Triton kernels over tiles of the pair matrix: a tile is made, reduced and forgotten inside one program.

Importing this imports Triton; `dispatch` does so only where it can run. All matrices are contiguous, statistics are
fp32, and logits of entries that do not count (beyond the edge, equal keys) are -inf. To Triton a matrix is a pointer,
a `tl.tensor` as a number is.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def _kernel(function: Callable[..., Any]) -> Any:
    """Triton reads a function's source and globals: it wants the function itself, where a type checker wrapped it."""
    return triton.jit(inspect.unwrap(function))


@_kernel
def _logits(  # noqa: PLR0913
    x: tl.tensor,
    y: tl.tensor,
    row_keys: tl.tensor,
    column_keys: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    dim: tl.tensor,
    keyed: tl.constexpr,
    widen: tl.constexpr,
    block_dim: tl.constexpr,
) -> tl.tensor:
    """The tile <x_i, y_j> of these rows and columns, summed in fp32."""
    is_row, is_column = rows < num_rows, columns < num_columns
    row_pointers = x + rows.to(tl.int64)[:, None] * dim
    column_pointers = y + columns.to(tl.int64)[None, :] * dim
    logits = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for start in range(0, dim, block_dim):
        along = start + tl.arange(0, block_dim)
        some_x = tl.load(row_pointers + along[None, :], mask=is_row[:, None] & (along < dim)[None, :], other=0.0)
        some_y = tl.load(column_pointers + along[:, None], mask=(along < dim)[:, None] & is_column[None, :], other=0.0)
        if widen:
            some_x, some_y = some_x.to(tl.float32), some_y.to(tl.float32)
        logits = tl.dot(some_x, some_y, logits, input_precision="ieee")
    counts = is_row[:, None] & is_column[None, :]
    if keyed:
        row_key = tl.load(row_keys + rows, mask=is_row, other=0)
        column_key = tl.load(column_keys + columns, mask=is_column, other=0)
        counts = counts & (row_key[:, None] != column_key[None, :])
    return tl.where(counts, logits, float("-inf"))


@_kernel
def _finite(largest: tl.tensor) -> tl.tensor:
    """A reference for exponentials: the largest logit, or 0 where there is none (-inf - -inf is no number)."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@_kernel
def _log_sum(reference: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Reference + log total; -inf for an empty sum."""
    return tl.where(total == 0.0, float("-inf"), reference + tl.log(tl.where(total == 0.0, 1.0, total)))


@_kernel
def reduce_kernel(  # noqa: PLR0913
    x: tl.tensor,
    y: tl.tensor,
    row_keys: tl.tensor,
    column_keys: tl.tensor,
    row_parts: tl.tensor,
    column_parts: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    dim: tl.tensor,
    span: tl.tensor,
    keyed: tl.constexpr,
    widen: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_dim: tl.constexpr,
) -> None:
    """Log-sum-exps of one block of rows over `span` columns, and of each of these columns over the block of rows.

    Program (r, c) writes row_parts[c, its rows] and column_parts[r, its columns], once each.
    """
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    largest = tl.full((block_rows,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((block_rows,), dtype=tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, num_columns), block_columns):
        columns = start + tl.arange(0, block_columns)
        logits = _logits(
            x, y, row_keys, column_keys, rows, columns, num_rows, num_columns, dim, keyed, widen, block_dim
        )
        reference = _finite(tl.max(logits, 0))
        column_lse = _log_sum(reference, tl.sum(tl.exp(logits - reference[None, :]), 0))
        place = column_parts + tl.program_id(0).to(tl.int64) * num_columns + columns
        tl.store(place, column_lse, mask=columns < num_columns)
        new = tl.maximum(largest, tl.max(logits, 1))
        reference = _finite(new)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(logits - reference[:, None]), 1)
        largest = new
    place = row_parts + tl.program_id(1).to(tl.int64) * num_rows + rows
    tl.store(place, _log_sum(_finite(largest), total), mask=rows < num_rows)


@_kernel
def derivative_kernel(  # noqa: PLR0913
    x: tl.tensor,
    y: tl.tensor,
    row_keys: tl.tensor,
    column_keys: tl.tensor,
    row_logs: tl.tensor,
    column_logs: tl.tensor,
    row_gradients: tl.tensor,
    column_gradients: tl.tensor,
    tile: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    dim: tl.tensor,
    keyed: tl.constexpr,
    widen: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_dim: tl.constexpr,
) -> None:
    """d loss / d Z of one block: g_i exp(z_ij - row_i) + h_j exp(z_ij - column_j), rounded to the type of `tile`.

    `row_logs` and `column_logs` are the log-sum-exps, +inf where nothing counts.
    """
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    columns = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    logits = _logits(x, y, row_keys, column_keys, rows, columns, num_rows, num_columns, dim, keyed, widen, block_dim)
    is_row, is_column = rows < num_rows, columns < num_columns
    row_lse = tl.load(row_logs + rows, mask=is_row, other=float("inf"))
    column_lse = tl.load(column_logs + columns, mask=is_column, other=float("inf"))
    g = tl.load(row_gradients + rows, mask=is_row, other=0.0)
    h = tl.load(column_gradients + columns, mask=is_column, other=0.0)
    values = g[:, None] * tl.exp(logits - row_lse[:, None]) + h[None, :] * tl.exp(logits - column_lse[None, :])
    place = tile + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(place, values.to(tile.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
