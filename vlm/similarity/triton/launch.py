"""Log-sum-exp over rows and columns of the pair matrix by Triton kernels; `log_sum_exp` of scaled rows, on a GPU.

Importing this imports Triton: see `vlm.similarity.triton.dispatch`, which decides where that pays.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.similarity.tiles import slices
from vlm.similarity.triton.kernels import derivative_kernel, reduce_kernel


@dataclass(frozen=True)
class Blocks:
    """The block that one program takes at a time: rows, columns and dimensions (powers of two, at least 16)."""

    rows: int
    columns: int
    dim: int
    warps: int
    stages: int


# fp32 products run on the ordinary units: smaller blocks, or the registers overflow.
_BLOCKS = {
    torch.float32: Blocks(64, 64, 32, warps=4, stages=3),
    torch.bfloat16: Blocks(128, 128, 64, warps=8, stages=3),
}
_ROW_BLOCKS = 256  # partial sums of columns held at a time: 1 KiB a column
_PROGRAMS = 1024  # enough for some waves on any GPU
_TILE_ROWS, _TILE_COLUMNS = 4096, 8192


def fused_log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    row_keys: Int64[Tensor, " rows"] | None = None,
    column_keys: Int64[Tensor, " columns"] | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Of each row log sum_j exp <x_i, y_j>, of each column log sum_i exp <x_i, y_j>, in fp32; rows hold the scale.

    Entries of equal keys are left out; -inf where no entry counts. Differentiable in rows and columns, and
    deterministic: no atomics. `matmul_dtype` is the precision of the factors of products, fp32 or bf16 (None: that of
    the rows). Logits are fp32 sums, not rounded to the factors' precision.

    Forward: 2 n m D operations in one kernel. No tile leaves its program, but its columns' sums: partial sums take at
    most 1 KiB a column, and 4 bytes a row for each of few (up to 1024 / row blocks) spans of columns.
    Backward: 6 n m D. The kernel recomputes a tile of at most 4096 x 8192 (128 MiB in fp32, 64 MiB in bf16) as
    d loss / d Z, which two library products multiply out: 8 n m D and a register for each of a row's D sums are what a
    kernel without that tile would take.
    """
    row, column = _Fused.apply(rows, columns, row_keys, column_keys, matmul_dtype or rows.dtype)
    return row, column


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        row_keys: Tensor | None,
        column_keys: Tensor | None,
        matmul_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        inputs = (rows.to(matmul_dtype).contiguous(), columns.to(matmul_dtype).contiguous(), row_keys, column_keys)
        with torch.cuda.device_of(rows):
            row, column = _Launch(*inputs).reduce()
        ctx.types = rows.dtype, columns.dtype
        ctx.save_for_backward(*inputs, row, column)
        return row, column

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, row, column = ctx.saved_tensors
        with torch.cuda.device_of(row), torch.autocast(row.device.type, enabled=False):
            d_rows, d_columns = _Launch(*inputs).differentiate((row, column), gradients)
        return d_rows.to(ctx.types[0]), d_columns.to(ctx.types[1]), None, None, None


class _Launch:
    """The kernels' runs over the pairs of two contiguous matrices."""

    def __init__(self, x: Tensor, y: Tensor, row_keys: Tensor | None, column_keys: Tensor | None) -> None:
        self._x, self._y = x, y
        self._keyed = row_keys is not None and column_keys is not None
        # A kernel that does not read keys takes any address.
        self._row_keys = x if row_keys is None else row_keys.contiguous()
        self._column_keys = y if column_keys is None else column_keys.contiguous()
        self._blocks = _BLOCKS[x.dtype]
        # Triton's interpreter would multiply the bits of bf16 as integers; products of bf16 are exact in fp32.
        self._widen = x.dtype == torch.bfloat16 and bool(triton.knobs.runtime.interpret)

    def reduce(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of each row and each column."""
        blocks, m = self._blocks, len(self._y)
        row = self._x.new_empty(len(self._x), dtype=torch.float32)
        column = row.new_full((m,), float("-inf"))
        for rows in slices(len(self._x), _ROW_BLOCKS * blocks.rows):
            n = rows.stop - rows.start
            row_blocks, column_blocks = triton.cdiv(n, blocks.rows), max(triton.cdiv(m, blocks.columns), 1)
            span = triton.cdiv(column_blocks, triton.cdiv(_PROGRAMS, row_blocks))
            spans = triton.cdiv(column_blocks, span)
            row_parts, column_parts = row.new_empty(spans, n), row.new_empty(row_blocks, m)
            reduce_kernel[row_blocks, spans](
                *self._inputs(rows, slice(0, m)),
                row_parts,
                column_parts,
                n,
                m,
                self._x.shape[1],
                span * blocks.columns,
                **self._options(),
            )
            row[rows] = row_parts.logsumexp(0)
            column = torch.logaddexp(column, column_parts.logsumexp(0))
        return row, column

    def differentiate(
        self, results: tuple[Tensor, Tensor], gradients: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "columns dim"]]:
        """The gradients of rows and columns, fp32."""
        d_x, d_y = (torch.zeros_like(matrix, dtype=torch.float32) for matrix in (self._x, self._y))
        # No entry: weight exp(-inf) = 0.
        row_logs, column_logs = (result.masked_fill(result.isneginf(), float("inf")) for result in results)
        g, h = (gradient.contiguous() for gradient in gradients)
        buffer = self._x.new_empty(min(len(self._x), _TILE_ROWS) * min(len(self._y), _TILE_COLUMNS))
        for rows in slices(len(self._x), _TILE_ROWS):
            for columns in slices(len(self._y), _TILE_COLUMNS):
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                tile = buffer[: shape[0] * shape[1]].view(shape)
                derivative_kernel[
                    triton.cdiv(shape[0], self._blocks.rows), triton.cdiv(shape[1], self._blocks.columns)
                ](
                    *self._inputs(rows, columns),
                    row_logs[rows],
                    column_logs[columns],
                    g[rows],
                    h[columns],
                    tile,
                    *shape,
                    self._x.shape[1],
                    **self._options(),
                )
                d_x[rows] += tile @ self._y[columns]
                d_y[columns] += tile.T @ self._x[rows]
        return d_x, d_y

    def _inputs(self, rows: slice, columns: slice) -> tuple[Tensor, ...]:
        return self._x[rows], self._y[columns], self._row_keys[rows], self._column_keys[columns]

    def _options(self) -> dict[str, Any]:
        blocks = self._blocks
        return {
            "keyed": self._keyed,
            "widen": self._widen,
            "block_rows": blocks.rows,
            "block_columns": blocks.columns,
            "block_dim": blocks.dim,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
            "enable_fp_fusion": True,  # unset, Triton 3.9 warns that its default will change
        }
