"""Log-sum-exp over the rows and the columns of the pair matrix, from one product and in one pass."""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.similarity.entries import EntryWeights
from vlm.similarity.tiles import Columns, TileKernel, reduce_tiles

Weights = tuple[EntryWeights, ...]


def row_log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    scale: Float[Tensor, " rows_or_1"],
    weights: Weights = (),
    *,
    product: torch.dtype | None = None,
) -> Float[Tensor, " rows"]:
    """log sum_j w_ij exp(scale_i <x_i, y_j>) of each row; -inf where no entry counts.

    `scale` is one number, or one a row. Differentiable in rows, columns and scale. Weights see logits as similarities.
    """
    scaled = rows * scale[:, None]
    kernel = _LogSumExp((weights, ()), (len(rows), 0), in_range=_in_range(scaled, columns))
    return reduce_tiles(kernel, scaled, columns, product=product)[0]


def log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    scale: Float[Tensor, "1"],
    row_weights: Weights = (),
    column_weights: Weights | None = None,
    *,
    product: torch.dtype | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Of each row log sum_j w_ij exp(a <x_i, y_j>), of each column log sum_i w'_ij exp(a <x_i, y_j>); a the scale.

    Columns are summed over this rank's rows only: `RowGroup.merge_log_sum_exp` puts the ranks' parts together. w' is w
    where it is not given; -inf where no entry counts. Differentiable in rows, columns and scale. Weights see logits as
    similarities.
    """
    scaled = rows * scale
    weights = (row_weights, row_weights if column_weights is None else column_weights)
    in_range = _in_range(scaled, columns)
    kernel = _LogSumExp(weights, (len(rows), columns.num_columns), in_range=in_range)
    row, column = reduce_tiles(kernel, scaled, columns, product=product)
    return row, column


def log_sum_exp_of_scales(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    row_scale: Float[Tensor, " rows"],
    column_scale: Float[Tensor, " columns"],
    row_weights: Weights = (),
    column_weights: Weights | None = None,
    *,
    product: torch.dtype | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """`log_sum_exp` with a scale for each row and each column: logits u_i <x_i, y_j> and v_j <x_i, y_j>.

    Differentiable in rows, columns and scales. Weights see plain similarities.
    """
    weights = (row_weights, row_weights if column_weights is None else column_weights)
    kernel = _ScaledLogSumExp(weights, row_scale.detach(), column_scale.detach())
    row, column = reduce_tiles(kernel, rows, columns, row_scale, column_scale, product=product)
    return row, column


# exp(+-40) leaves room in fp32 for a sum of 2^60 of the largest, and for 2^60 between the smallest and zero.
_LARGEST_IN_RANGE = 40.0


def _in_range(rows: Tensor, columns: Columns) -> bool:
    """Whether no logit can be so large that exp needs a reference."""
    if not len(rows):
        return True
    return bool(rows.detach().norm(dim=1).max() * columns.largest_norm() < _LARGEST_IN_RANGE)


class _LogSumExp(TileKernel):
    """Row and column statistics of logits that are the tile itself.

    In range, one exponential serves both directions; else each has its own running maximum.
    """

    def __init__(self, weights: tuple[Weights, Weights], sizes: tuple[int, int], *, in_range: bool) -> None:
        self._row_weights, self._column_weights = weights
        self._sizes = sizes
        self._with_columns = sizes[1] > 0
        self._same_weights = weights[0] is weights[1] or not self._with_columns
        self._in_range = in_range and self._same_weights
        self._results: tuple[Tensor, ...] = ()

    def begin(self, like: Tensor) -> None:
        self._row, self._column = (_Running(size, like, fixed=self._in_range) for size in self._sizes)

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        if self._in_range:
            values = self._exponentials(tile, rows, columns)
            self._row.total[rows] += values.sum(1)
            if self._with_columns:
                self._column.total[columns] += values.sum(0)
            return
        if self._with_columns:
            self._column.add(_weighed(tile.clone(), tile, self._column_weights, rows, columns), columns, dim=0)
        self._row.add(_weighed(tile, tile, self._row_weights, rows, columns), rows, dim=1)

    def finish(self) -> tuple[Tensor, ...]:
        results = (self._row.log_sum_exp(), self._column.log_sum_exp())
        self._results = results if self._with_columns else results[:1]
        return self._results

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        # No entry: weight exp(-inf) = 0.
        self._references = tuple(result.nan_to_num(neginf=float("inf")) for result in self._results)
        self._gradients = gradients
        self._factors = tuple(
            gradient * (-reference).exp() for gradient, reference in zip(gradients, self._references, strict=True)
        )

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        if self._in_range:
            values = self._exponentials(tile, rows, columns)
            if self._with_columns:
                return values.mul_(self._factors[0][rows, None] + self._factors[1][None, columns])
            return values.mul_(self._factors[0][rows, None])
        of_columns = tile.clone() if self._with_columns else None
        logits = _weighed(tile, tile, self._row_weights, rows, columns)
        share = logits.sub_(self._references[0][rows, None]).exp_().mul_(self._gradients[0][rows, None])
        if of_columns is None:
            return share
        logits = _weighed(of_columns, of_columns, self._column_weights, rows, columns)
        return share.addcmul_(logits.sub_(self._references[1][None, columns]).exp_(), self._gradients[1][None, columns])

    def _exponentials(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        if all(type(weights).multiply is not EntryWeights.multiply for weights in self._row_weights):
            values = tile.exp_()
            for weights in self._row_weights:
                weights.multiply(values, values, rows, columns)
            return values
        return _weighed(tile, tile, self._row_weights, rows, columns).exp_()


class _ScaledLogSumExp(TileKernel):
    """Row and column statistics with a scale a line: two logits an entry, from one product."""

    def __init__(self, weights: tuple[Weights, Weights], row_scale: Tensor, column_scale: Tensor) -> None:
        self._row_weights, self._column_weights = weights
        self._row_scale, self._column_scale = row_scale, column_scale
        self._results: tuple[Tensor, ...] = ()

    def begin(self, like: Tensor) -> None:
        self._row, self._column = (
            _Running(len(scale), like, fixed=False) for scale in (self._row_scale, self._column_scale)
        )

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        of_rows, of_columns = self._logits(tile, rows, columns)
        self._row.add(of_rows, rows, dim=1)
        self._column.add(of_columns, columns, dim=0)

    def finish(self) -> tuple[Tensor, ...]:
        self._results = (self._row.log_sum_exp(), self._column.log_sum_exp())
        return self._results

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        self._gradients = gradients
        self._references = tuple(result.nan_to_num(neginf=float("inf")) for result in self._results)
        self._d_scales = tuple(torch.zeros_like(result) for result in self._results)

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        of_rows, of_columns = self._logits(tile, rows, columns)
        of_rows.sub_(self._references[0][rows, None]).exp_().mul_(self._gradients[0][rows, None])
        of_columns.sub_(self._references[1][None, columns]).exp_().mul_(self._gradients[1][None, columns])
        self._d_scales[0][rows] += torch.linalg.vecdot(of_rows, tile)
        self._d_scales[1][columns] += torch.linalg.vecdot(of_columns, tile, dim=0)
        of_rows.mul_(self._row_scale[rows, None])
        return of_rows.addcmul_(of_columns, self._column_scale[None, columns])

    def parameter_gradients(self) -> tuple[Tensor, ...]:
        return self._d_scales

    def _logits(self, tile: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        of_rows = tile * self._row_scale[rows, None]
        of_columns = tile * self._column_scale[None, columns]
        return (
            _weighed(of_rows, tile, self._row_weights, rows, columns),
            _weighed(of_columns, tile, self._column_weights, rows, columns),
        )


def _weighed(logits: Tensor, tile: Tensor, weights: Weights, rows: slice, columns: slice) -> Tensor:
    for some in weights:
        some.add_logs(logits, tile, rows, columns)
    return logits


class _Running:
    """Sums of exponentials against a reference that follows the largest logit so far, or stays at 0."""

    def __init__(self, size: int, like: Tensor, *, fixed: bool) -> None:
        self.reference = like.new_full((size,), 0.0 if fixed else torch.finfo(like.dtype).min)
        self.total = like.new_zeros(size)

    def add(self, logits: Tensor, lines: slice, dim: int) -> None:
        """Add a tile's logits to its lines; they are overwritten."""
        old = self.reference[lines]
        new = torch.maximum(old, logits.amax(dim))
        values = logits.sub_(new.unsqueeze(dim)).exp_().sum(dim)
        self.total[lines] = self.total[lines] * (old - new).exp() + values
        self.reference[lines] = new

    def log_sum_exp(self) -> Tensor:
        """The result; -inf where nothing was added."""
        return self.reference + self.total.log()
