"""The one loop over tiles of the pair matrix: what a kernel makes of each tile, and the gradient by recomputing it.

The pair matrix Z = X Y^T holds this rank's rows against all columns. It never exists: a tile is computed, reduced and
forgotten; the backward pass computes it again, asks the kernel for d loss / d Z of that tile, and multiplies it out.
Memory is O((rows + columns) dim), operations are 2 N M D forward and 6 N M D backward.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.distributed.ring import Ring

_TILE_ROWS, _TILE_COLUMNS = 1024, 1024
_CUDA_TILE_ROWS, _CUDA_TILE_COLUMNS = 4096, 8192
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 128, 1024
_MOST_KEPT = 2**20  # entries of a matrix that is kept for the backward pass: 4 MB


@dataclass(frozen=True)
class Columns:
    """The other side of the pair matrix: all its rows here, or this rank's own block of a ring.

    `pairs_at` is where in `rows` the partners of this rank's own rows begin.
    """

    rows: Float[Tensor, "columns dim"]
    ring: Ring | None = None
    pairs_at: int | None = None

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
    """A reduction of the tiles of one pair matrix; made for one call, it keeps its statistics between the passes.

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
    scale: Float[Tensor, " rows_or_1"] | None = None,
    matmul_dtype: torch.dtype | None = None,
    paired: bool = False,
) -> tuple[Tensor, ...]:
    """The results of `kernel` over all tiles of rows x columns, differentiable in rows, columns and parameters.

    Rows are multiplied by `scale` first, one number or one a row, which gets its gradient too; no copy is kept for it.
    `matmul_dtype` is the precision of the factors of products (None: that of the rows); sums are in at least fp32.
    Results over columns are this rank's part alone. With a ring, a collective of its ranks in both passes. `paired`
    adds one more result, each row's product with its own partner in full precision: a term of its own for it would hold
    the gradients of both sides twice.
    """
    how = _How(kernel, columns.ring, matmul_dtype, columns.pairs_at if paired else None)
    results: tuple[Tensor, ...] = _Reduce.apply(how, scale, rows, columns.rows, *parameters)
    return results


class _How(NamedTuple):
    kernel: TileKernel
    ring: Ring | None
    matmul_dtype: torch.dtype | None
    pairs_at: int | None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: _How,
        scale: Tensor | None,
        rows: Tensor,
        columns: Tensor,
        *parameters: Tensor,  # noqa: ARG004 (the kernel holds their values; here they are the graph's)
    ) -> tuple[Tensor, ...]:
        kernel, ring, matmul_dtype, pairs_at = ctx.how = how
        ctx.save_for_backward(scale, rows, columns)
        ctx.level = product_level(rows, columns, matmul_dtype, scale)
        loop = _Loop(rows, scale, matmul_dtype, ctx.level)
        kernel.begin(rows.new_empty((), dtype=loop.precise))
        with torch.autocast(rows.device.type, enabled=False):
            for start, block in _blocks(columns, ring):
                loop.forward(kernel, block, start, keep=ring is None and loop.is_kept(columns))
        ctx.kept = loop.kept
        partners = () if pairs_at is None else (_partner_products(rows, scale, columns[pairs_at:]),)
        # Detached: what the kernel keeps is not what gets the graph, which would hold itself for ever.
        return *(result.detach() for result in kernel.finish()), *partners

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale, rows, columns = ctx.saved_tensors
        kernel, ring, matmul_dtype, pairs_at = ctx.how
        result_gradients = gradients if pairs_at is None else gradients[:-1]
        loop = _Loop(rows, scale, matmul_dtype, ctx.level, ctx.kept)
        d_rows = torch.zeros_like(rows)
        with torch.autocast(rows.device.type, enabled=False):
            kernel.begin_backward(result_gradients)
            if ring is None:
                d_columns = loop.backward(kernel, columns, 0, d_rows)
            else:
                starts = _starts(ring)
                d_columns = ring.visit(
                    columns, lambda owner, block: loop.backward(kernel, block, starts[owner], d_rows)
                )
            parameters = kernel.parameter_gradients()
            if pairs_at is not None:
                at = slice(pairs_at, pairs_at + len(rows))
                _add_partners(gradients[-1], rows, scale, columns[at], d_rows, d_columns[at])
        d_scale = None
        if scale is not None:
            blocks = [(d_rows[some] * rows[some]).sum(1) for some in slices(len(rows), _TILE_ROWS)]
            d_scale = torch.cat([*blocks, d_rows.new_zeros(0)]).sum_to_size(scale.shape).to(scale.dtype)
            d_rows.mul_(scale[:, None])
        return None, d_scale, d_rows, d_columns, *parameters


class Scratch:
    """Memory for one tile after another: fresh pages cost a CPU as much as the arithmetic on them."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def of(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of unknown content, which shares its memory with all that came before."""
        size = math.prod(shape)
        if self._memory is None or len(self._memory) < size:
            self._memory = like.new_empty(size, dtype=dtype or like.dtype)
        return self._memory[:size].view(shape)

    def like(self, tile: Tensor) -> Tensor:
        """The same in the shape and type of a tile."""
        return self.of(tile, tile.shape)


class _Loop:
    """The tiles of one rank's rows against one block of columns after another, in buffers that are used again.

    Rows are scaled, and factors cast, as their tiles come: no whole copy of either side exists. A low-precision product
    is rounded as its difference from `level`: what it is near to keeps most digits. A matrix of one small tile is
    `kept` for the backward pass.
    """

    def __init__(
        self,
        rows: Tensor,
        scale: Tensor | None,
        matmul_dtype: torch.dtype | None,
        level: float,
        kept: Tensor | None = None,
    ) -> None:
        self.kept = kept
        self._rows, self._scale, self._level = rows, scale, level
        self._matmul_dtype = matmul_dtype or rows.dtype
        self.precise = torch.promote_types(rows.dtype, torch.float32)
        on_cpu = rows.device.type == "cpu"
        self._tile_rows, self._tile_columns = (
            (_TILE_ROWS, _TILE_COLUMNS) if on_cpu else (_CUDA_TILE_ROWS, _CUDA_TILE_COLUMNS)
        )
        self._products, self._precise_products, self._sums, self._cast = (Scratch() for _ in range(4))

    def is_kept(self, columns: Tensor) -> bool:
        """Whether one tile holds the whole matrix, and is small enough to be kept."""
        is_one = len(self._rows) <= self._tile_rows and len(columns) <= self._tile_columns
        return is_one and len(self._rows) * len(columns) <= _MOST_KEPT

    def forward(self, kernel: TileKernel, block: Tensor, start: int, *, keep: bool) -> None:
        for rows, columns, row_factors, column_factors in self._places(block):
            tile = self._tile(row_factors, column_factors)
            if keep:
                self.kept = tile.clone()
            kernel.accumulate(tile, rows, slice(columns.start + start, columns.stop + start))

    def backward(self, kernel: TileKernel, block: Tensor, start: int, d_rows: Tensor) -> Tensor:
        """d loss / d block; what the block says about the scaled rows is added to `d_rows`."""
        d_block = torch.zeros_like(block)
        for rows, columns, row_factors, column_factors in self._places(block):
            tile = self._tile(row_factors, column_factors) if self.kept is None else self._copy_of(self.kept)
            there = slice(columns.start + start, columns.stop + start)
            d_tile = kernel.derivative(tile, rows, there)
            if d_tile.dtype != self._matmul_dtype:
                d_tile = self._products.of(row_factors, d_tile.shape).copy_(d_tile)
            self._add_product(d_rows[rows], d_tile, column_factors)
            self._add_product(d_block[columns], d_tile.T, row_factors)
        return d_block

    def _places(self, block: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Where each tile lies, and its factors."""
        for rows in slices(len(self._rows), self._tile_rows):
            row_factors = _scaled(self._rows, self._scale, rows).to(self._matmul_dtype)
            for columns in slices(len(block), self._tile_columns):
                column_factors = block[columns]
                if column_factors.dtype != self._matmul_dtype:
                    column_factors = self._cast.of(column_factors, column_factors.shape, self._matmul_dtype).copy_(
                        column_factors
                    )
                yield rows, columns, row_factors, column_factors

    def _tile(self, row_factors: Tensor, column_factors: Tensor) -> Tensor:
        products = self._products.of(row_factors, (len(row_factors), len(column_factors)))
        if products.dtype == self.precise:
            return torch.mm(row_factors, column_factors.T, out=products)
        return centred_product(
            row_factors,
            column_factors,
            self._level,
            products,
            self._precise_products.of(row_factors, products.shape, self.precise),
        )

    def _copy_of(self, tile: Tensor) -> Tensor:
        return self._precise_products.like(tile).copy_(tile)

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype == total.dtype:
            total.addmm_(a, b)
        else:
            total += torch.mm(a, b, out=self._sums.of(a, total.shape))


def _scaled(rows: Tensor, scale: Tensor | None, some: slice) -> Tensor:
    if scale is None:
        return rows[some]
    return rows[some] * (scale if len(scale) == 1 else scale[some])[:, None]


def _partner_products(rows: Tensor, scale: Tensor | None, partners: Tensor) -> Float[Tensor, " rows"]:
    """<x_i, y_i> of the scaled rows and their partners."""
    products = [(_scaled(rows, scale, some) * partners[some]).sum(1) for some in slices(len(rows), _TILE_ROWS)]
    return torch.cat([*products, rows.new_zeros(0)])


def _add_partners(
    gradient: Tensor, rows: Tensor, scale: Tensor | None, partners: Tensor, d_rows: Tensor, d_partners: Tensor
) -> None:
    """The gradient of `_partner_products`, added to that of the scaled rows and of the partners."""
    for some in slices(len(rows), _TILE_ROWS):
        d_rows[some].addcmul_(partners[some], gradient[some, None])
        d_partners[some].addcmul_(_scaled(rows, scale, some), gradient[some, None])


def centred_product(x: Tensor, y: Tensor, level: float, spare: Tensor, out: Tensor) -> Tensor:
    """x y^T in `out`, rounded to the precision of x, y and `spare` as its difference from `level`."""
    spare.fill_(-level).addmm_(x, y.T)  # added before the sum is rounded
    return out.copy_(spare).add_(level)


def product_level(
    rows: Tensor, columns: Tensor, matmul_dtype: torch.dtype | None, scale: Tensor | None = None
) -> float:
    """About the entries that weigh most in a softmax of a row, from a few rows and columns; 0 at full precision.

    Rows are of the second half and columns of the first, for few of them to be pairs; a median passes over those.
    """
    if matmul_dtype is None or matmul_dtype == torch.promote_types(rows.dtype, torch.float32) or not len(rows):
        return 0.0
    row_factors = _scaled(rows, scale, slice(len(rows) // 2, len(rows), max(1, len(rows) // 2 // _SAMPLED_ROWS)))
    column_factors = columns[: (len(columns) + 1) // 2 : max(1, len(columns) // 2 // _SAMPLED_COLUMNS)]
    entries = row_factors @ column_factors.T
    level = torch.linalg.vecdot(entries.softmax(1), entries).median()
    return float(level.to(matmul_dtype)) if len(column_factors) else 0.0


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
