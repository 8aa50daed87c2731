"""The one loop over tiles of the pair matrix: what a kernel makes of each tile, and the gradient by recomputing it.

The pair matrix Z = X Y^T holds this rank's rows against all columns. It never exists: a tile is computed, reduced and
forgotten; the backward pass computes it again, asks the kernel for d loss / d Z of that tile, and multiplies it out.
Memory is O((rows + columns) dim), operations are 2 N M D forward and 6 N M D backward.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.similarity.ring import Ring

_TILE_ROWS, _TILE_COLUMNS = 512, 1024
_CUDA_TILE_ROWS, _CUDA_TILE_COLUMNS = 4096, 8192


@dataclass(frozen=True)
class Columns:
    """The other side of the pair matrix: all its rows here, or this rank's own block of a ring."""

    rows: Float[Tensor, "columns dim"]
    ring: Ring | None = None

    @property
    def num_columns(self) -> int:
        """How many columns the pair matrix has."""
        return len(self.rows) if self.ring is None else self.ring.ranks.num_rows

    def largest_norm(self) -> Float[Tensor, ""]:
        """A bound on the columns' Euclidean norms. Collective with a ring."""
        norms = self.rows.detach().norm(dim=1)
        largest = norms.max() if len(norms) else norms.new_zeros(())
        return largest if self.ring is None else self.ring.ranks.largest(largest)


class TileKernel(ABC):
    """What becomes of the tiles of one pair matrix; made for one call, it keeps its statistics between the passes.

    Tiles are in at least fp32 and may be overwritten. `rows` and `columns` say where in the matrix a tile lies.
    """

    @abstractmethod
    def begin(self, like: Tensor) -> None:
        """Make the statistics, of the type and on the device of `like`."""

    @abstractmethod
    def accumulate(self, tile: Float[Tensor, "r c"], rows: slice, columns: slice) -> None:
        """Add a tile of Z to the statistics."""

    @abstractmethod
    def finish(self) -> tuple[Tensor, ...]:
        """The results, after the last tile."""

    @abstractmethod
    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        """Take the gradients of the results, before the first tile comes again."""

    @abstractmethod
    def derivative(self, tile: Float[Tensor, "r c"], rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        """d loss / d Z of a tile."""

    def parameter_gradients(self) -> tuple[Tensor, ...]:
        """The gradients of the parameters that `reduce_tiles` was given, after the last tile."""
        return ()


def reduce_tiles(
    kernel: TileKernel,
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    *parameters: Tensor,
    product: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The results of `kernel` over all tiles of rows x columns, differentiable in rows, columns and parameters.

    `product` is the precision of the factors of matrix products (None: that of the rows); sums are in at least fp32.
    Results over columns are this rank's part alone. With a ring, a collective of its ranks in both passes.
    """
    results: tuple[Tensor, ...] = _Reduce.apply(kernel, columns.ring, product, rows, columns.rows, *parameters)
    return results


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: TileKernel,
        ring: Ring | None,
        product: torch.dtype | None,
        rows: Tensor,
        columns: Tensor,
        *parameters: Tensor,  # noqa: ARG004 (the kernel holds their values; here they are the graph's)
    ) -> tuple[Tensor, ...]:
        ctx.kernel, ctx.ring, ctx.product = kernel, ring, product
        ctx.save_for_backward(rows, columns)
        product = product or rows.dtype
        loop = _Loop(rows, product)
        kernel.begin(rows.new_empty((), dtype=loop.precise))
        with torch.autocast(rows.device.type, enabled=False):
            for start, block in _blocks(columns, ring):
                loop.forward(kernel, block, start)
        return kernel.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = ctx.saved_tensors
        kernel: TileKernel = ctx.kernel
        loop = _Loop(rows, ctx.product or rows.dtype)
        d_rows = torch.zeros_like(rows)
        with torch.autocast(rows.device.type, enabled=False):
            kernel.begin_backward(gradients)
            if ctx.ring is None:
                d_columns = loop.backward(kernel, columns, 0, d_rows)
            else:
                starts = _starts(ctx.ring)
                d_columns = ctx.ring.visit(
                    columns, lambda owner, block: loop.backward(kernel, block, starts[owner], d_rows)
                )
            parameters = kernel.parameter_gradients()
        return None, None, None, d_rows, d_columns, *parameters


class _Loop:
    """The tiles of one rank's rows against one block of columns after another, in buffers that are used again."""

    def __init__(self, rows: Tensor, product: torch.dtype) -> None:
        self._rows = rows.to(product)
        self.precise = torch.promote_types(rows.dtype, torch.float32)
        on_cpu = rows.device.type == "cpu"
        self._tile_rows, self._tile_columns = (
            (_TILE_ROWS, _TILE_COLUMNS) if on_cpu else (_CUDA_TILE_ROWS, _CUDA_TILE_COLUMNS)
        )
        self._products: Tensor | None = None
        self._tile: Tensor | None = None

    def forward(self, kernel: TileKernel, block: Tensor, start: int) -> None:
        block = block.to(self._rows.dtype)
        for rows, columns in self._places(block):
            tile = self._product(self._rows[rows], block[columns])
            kernel.accumulate(tile, rows, slice(columns.start + start, columns.stop + start))

    def backward(self, kernel: TileKernel, block: Tensor, start: int, d_rows: Tensor) -> Tensor:
        """d loss / d block; what the block says about the rows is added to `d_rows`."""
        d_block = torch.zeros_like(block)
        block = block.to(self._rows.dtype)
        for rows, columns in self._places(block):
            tile = self._product(self._rows[rows], block[columns])
            there = slice(columns.start + start, columns.stop + start)
            d_tile = kernel.derivative(tile, rows, there).to(self._rows.dtype)
            _add_product(d_rows[rows], d_tile, block[columns])
            _add_product(d_block[columns], d_tile.T, self._rows[rows])
        return d_block

    def _places(self, block: Tensor) -> Iterator[tuple[slice, slice]]:
        for rows in slices(len(self._rows), self._tile_rows):
            for columns in slices(len(block), self._tile_columns):
                yield rows, columns

    def _product(self, x: Tensor, y: Tensor) -> Tensor:
        shape = (len(x), len(y))
        if self._products is None:
            self._products = x.new_empty(self._tile_rows * self._tile_columns)
            low = self._products.dtype != self.precise
            self._tile = x.new_empty(len(self._products), dtype=self.precise) if low else self._products
        assert self._tile is not None
        products = self._products[: shape[0] * shape[1]].view(shape)
        torch.mm(x, y.T, out=products)
        if self._tile is self._products:
            return products
        return self._tile[: shape[0] * shape[1]].view(shape).copy_(products)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def slices(length: int, step: int) -> Iterator[slice]:
    """[0, length) in consecutive pieces of at most `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _starts(ring: Ring) -> list[int]:
    return [sum(ring.ranks.counts[:rank]) for rank in range(ring.ranks.size)]


def _blocks(columns: Tensor, ring: Ring | None) -> Iterator[tuple[int, Tensor]]:
    if ring is None:
        yield 0, columns
        return
    starts = _starts(ring)
    for owner, block in ring.blocks(columns):
        yield starts[owner], block
