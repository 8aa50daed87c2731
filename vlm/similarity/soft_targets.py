"""Similarities summed under soft targets: constant weights of all entries, made tile by tile of a second product."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.similarity.entry_weights import EntryWeights
from vlm.similarity.tiles import Columns, Scratch, TileKernel, centred_product, product_level, reduce_tiles


@dataclass(frozen=True)
class SoftTargets(ABC):
    """Weights t_ij of a pair matrix's rows and u_ij of its columns: constant functions of p_ij = <rows_i, columns_j>.

    `rows` are this rank's and `columns` all ranks' rows of a second pair of embeddings (a teacher's, a frozen tower's),
    of any width. They get no gradient. Memory is theirs alone.
    """

    rows: Float[Tensor, "rows width"]
    columns: Float[Tensor, "columns width"]

    @abstractmethod
    def row_targets(self, products: Float[Tensor, "r c"], rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        """t_ij of a tile of p."""

    @abstractmethod
    def column_targets(self, products: Float[Tensor, "r c"], rows: slice, columns: slice) -> Float[Tensor, "r c"]:
        """u_ij of a tile of p."""


@dataclass(frozen=True)
class FunctionTargets(SoftTargets):
    """t_ij = u_ij = f(p_ij): f acts on each entry, leaves its argument as it is, and need not sum to 1 over a line."""

    function: Callable[[Tensor], Tensor]

    def row_targets(self, products: Tensor, rows: slice, columns: slice) -> Tensor:  # noqa: D102, ARG002
        return self.function(products)

    def column_targets(self, products: Tensor, rows: slice, columns: slice) -> Tensor:  # noqa: D102, ARG002
        return self.function(products)


@dataclass(frozen=True)
class SoftmaxTargets(SoftTargets):
    """t_ij = exp(p_ij - r_i) and u_ij = exp(p_ij - c_j): softmaxes whose log-sum-exps are known.

    The scale is in `rows` already. r_i is the log-sum-exp over all of row i, columns that are not in this matrix
    included (a queue's), so that these weights may sum to less than 1; c_j the same of column j, over all ranks' rows.
    A line of +inf has no weights.
    """

    row_logs: Float[Tensor, " rows"]
    column_logs: Float[Tensor, " columns"]

    def row_targets(self, products: Tensor, rows: slice, columns: slice) -> Tensor:  # noqa: D102, ARG002
        return (products - self.row_logs[rows, None]).exp_()

    def column_targets(self, products: Tensor, rows: slice, columns: slice) -> Tensor:  # noqa: D102, ARG002
        return (products - self.column_logs[None, columns]).exp_()


class WeightedSums(NamedTuple):
    """Sums over columns of each own row, and over this rank's rows of each column, with z_ij = <x_i, y_j>.

    `RowGroup.sum_to_owners` puts the ranks' parts of `columns` and `column_totals` together. Totals are constants.
    """

    rows: Float[Tensor, " rows"]  # sum_j t_ij z_ij
    row_totals: Float[Tensor, " rows"]  # sum_j t_ij
    columns: Float[Tensor, " columns"]  # sum_i u_ij z_ij
    column_totals: Float[Tensor, " columns"]  # sum_i u_ij


def target_sums(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    targets: SoftTargets,
    weights: tuple[EntryWeights, ...] = (),
    *,
    with_columns: bool = True,
    matmul_dtype: torch.dtype | None = None,
) -> WeightedSums:
    """The similarities of each row and column summed under `targets`, in one pass; differentiable in rows and columns.

    Targets are multiplied by `weights` (0 leaves an entry out). Similarities are plain: multiply the sums by the scale
    for logits. Without `with_columns` the sums over rows are empty, and cost nothing. Collective with a ring.
    """
    num_columns = columns.num_columns if with_columns else 0
    kernel = _TargetSums(targets, weights, num_columns, matmul_dtype or rows.dtype)
    results = reduce_tiles(kernel, rows, columns, matmul_dtype=matmul_dtype)
    return WeightedSums(results[0], results[1].detach(), results[2], results[3].detach())


class _TargetSums(TileKernel):
    """Row and column sums of targets times tile, and of targets; d loss / d z_ij = g_i t_ij + h_j u_ij."""

    def __init__(
        self, targets: SoftTargets, weights: tuple[EntryWeights, ...], num_columns: int, matmul_dtype: torch.dtype
    ) -> None:
        self._targets, self._weights, self._num_columns = targets, weights, num_columns
        self._with_columns = num_columns > 0
        self._rows, self._columns = targets.rows.detach().to(matmul_dtype), targets.columns.detach().to(matmul_dtype)
        self._level = product_level(targets.rows.detach(), targets.columns.detach(), matmul_dtype)
        self._products, self._precise_products = Scratch(), Scratch()

    def begin(self, like: Tensor) -> None:
        self._row_sums, self._row_totals = (like.new_zeros(len(self._rows)) for _ in range(2))
        self._column_sums, self._column_totals = (like.new_zeros(self._num_columns) for _ in range(2))

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        products = self._product(tile, rows, columns)
        targets = self._weighed(self._targets.row_targets(products, rows, columns), products, rows, columns)
        self._row_totals[rows] += targets.sum(1)
        self._row_sums[rows] += torch.linalg.vecdot(targets, tile)
        if self._with_columns:
            targets = self._weighed(self._targets.column_targets(products, rows, columns), products, rows, columns)
            self._column_totals[columns] += targets.sum(0)
            self._column_sums[columns] += torch.linalg.vecdot(targets, tile, dim=0)

    def finish(self) -> tuple[Tensor, ...]:
        return self._row_sums, self._row_totals, self._column_sums, self._column_totals

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        self._row_gradients, _, self._column_gradients, _ = gradients

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        products = self._product(tile, rows, columns)
        d_tile = torch.mul(
            self._targets.row_targets(products, rows, columns), self._row_gradients[rows, None], out=tile
        )
        if self._with_columns:
            d_tile.addcmul_(
                self._targets.column_targets(products, rows, columns), self._column_gradients[None, columns]
            )
        return self._weighed(d_tile, products, rows, columns)

    def _product(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """As the tiles of a log-sum-exp have them, to the last bit: softmaxes have to sum to 1."""
        row_factors, column_factors = self._rows[rows], self._columns[columns]
        products = self._products.of(row_factors, tile.shape)
        if products.dtype == tile.dtype:
            return torch.mm(row_factors, column_factors.T, out=products)
        return centred_product(row_factors, column_factors, self._level, products, self._precise_products.like(tile))

    def _weighed(self, values: Tensor, products: Tensor, rows: slice, columns: slice) -> Tensor:
        for some in self._weights:
            some.multiply(values, products, rows, columns)
        return values
