"""Log-sum-exp over the rows and the columns of the pair matrix, from one product and in one pass."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.similarity.choose import common_keys, fused_reduction
from vlm.similarity.entries import EntryWeights, EqualKeys
from vlm.similarity.tiles import Columns, Scratch, TileKernel, reduce_tiles

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
    kernel = _LogSumExp((weights, ()), (len(rows), None), in_range=_in_range(rows, scale, columns))
    return reduce_tiles(kernel, rows, columns, scale=scale, product=product)[0]


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
    similarities. Fused kernels run where they are right and faster (`vlm.similarity.choose`).
    """
    fused = _fused(rows, columns, row_weights, column_weights, product)
    if fused is not None:
        return fused(rows * scale)
    row, column = _tiled(rows, columns, scale, row_weights, column_weights, product)
    return row, column


def _fused(
    rows: Tensor,
    columns: Columns,
    row_weights: Weights,
    column_weights: Weights | None,
    product: torch.dtype | None,
) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Fused kernels as a function of the scaled rows, where they are to run."""
    keys = None if columns.ring else common_keys(row_weights, column_weights)
    fused = None if keys is None else fused_reduction(rows, columns.num_columns, product, _of_keys)
    if fused is None or keys is None:
        return None
    row_keys, column_keys = keys
    return lambda scaled: fused(scaled, columns.rows, row_keys, column_keys, product)


def _tiled(
    rows: Tensor,
    columns: Columns,
    scale: Tensor | None,
    row_weights: Weights,
    column_weights: Weights | None,
    product: torch.dtype | None,
    *,
    paired: bool = False,
) -> tuple[Tensor, ...]:
    weights = (row_weights, row_weights if column_weights is None else column_weights)
    in_range = _in_range(rows, rows.new_ones(1) if scale is None else scale, columns)
    kernel = _LogSumExp(weights, (len(rows), columns.num_columns), in_range=in_range)
    return reduce_tiles(kernel, rows, columns, scale=scale, product=product, paired=paired)


def _of_keys(
    rows: Tensor, columns: Tensor, row_keys: Tensor | None, column_keys: Tensor | None, product: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """What fused kernels compute, in plain torch."""
    weights = () if row_keys is None or column_keys is None else (EqualKeys(row_keys, column_keys),)
    row, column = _tiled(rows, Columns(columns), None, weights, None, product)
    return row, column


def paired_log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    scale: Float[Tensor, "1"],
    row_weights: Weights = (),
    column_weights: Weights | None = None,
    *,
    product: torch.dtype | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """The logit a <x_i, y_i> of each row and its partner in full precision, then what `log_sum_exp` gives.

    One backward pass for all three: a product of its own would hold the gradients of rows and columns a second time.
    Columns have to say where the partners are (`Columns.pairs_at`).
    """
    assert columns.pairs_at is not None
    if _fused(rows, columns, row_weights, column_weights, product) is not None:
        partners = columns.rows[columns.pairs_at : columns.pairs_at + len(rows)]
        own = scale * (rows * partners).sum(1)
        return own, *log_sum_exp(rows, columns, scale, row_weights, column_weights, product=product)
    row, column, own = _tiled(rows, columns, scale, row_weights, column_weights, product, paired=True)
    return own, row, column


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
    scales = row_scale.detach(), column_scale.detach()
    largest = max((float(scale.abs().max()) for scale in scales if len(scale)), default=0.0)
    # Asked of every rank: it is a collective with a ring.
    in_range = _in_range(rows, rows.new_full((1,), largest), columns)
    kernel = _ScaledLogSumExp(weights, *scales, in_range=in_range)
    row, column = reduce_tiles(kernel, rows, columns, row_scale, column_scale, product=product)
    return row, column


# exp(+-40) leaves room in fp32 for a sum of 2^60 of the largest, and for 2^60 between the smallest and zero.
_LARGEST_IN_RANGE = 40.0
_LOG2E = math.log2(math.e)  # powers of 2 take a third of exp's time on CPUs


@torch.no_grad()
def _in_range(rows: Tensor, scale: Tensor, columns: Columns) -> bool:
    """Whether no logit can be so large that exp needs a reference. Collective with a ring."""
    largest = columns.largest_norm()
    return not len(rows) or bool((rows.norm(dim=1) * scale).abs().max() * largest < _LARGEST_IN_RANGE)


class _LogSumExp(TileKernel):
    """Row and column statistics of logits that are the tile itself.

    In range, one exponential serves both directions; else each has its own running maximum.
    """

    def __init__(self, weights: tuple[Weights, Weights], sizes: tuple[int, int | None], *, in_range: bool) -> None:
        self._row_weights, self._column_weights = weights
        self._sizes = sizes
        self._with_columns = sizes[1] is not None
        self._same_weights = weights[0] is weights[1] or not self._with_columns
        self._in_range = in_range and self._same_weights
        self._spare = Scratch()

    def begin(self, like: Tensor) -> None:
        self._row, self._column = (
            _Running(size or 0, like, dim, fixed=self._in_range) for size, dim in zip(self._sizes, (1, 0), strict=True)
        )

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        if self._in_range:
            values = self._exponentials(tile, rows, columns)
            self._row.total[rows] += values.sum(1)
            if self._with_columns:
                self._column.total[columns] += values.sum(0)
            return
        of_rows, of_columns = self._logits(tile, rows, columns)
        if self._with_columns:
            self._column.add(of_columns, columns, self._spare.like(tile))
        self._row.add(of_rows, rows, of_rows)

    def finish(self) -> tuple[Tensor, ...]:
        results = (self._row.log_sum_exp(), self._column.log_sum_exp())
        return results if self._with_columns else results[:1]

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        self._row.begin_backward(gradients[0])
        if self._with_columns:
            self._column.begin_backward(gradients[1])

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        if self._in_range:
            values, factors = self._exponentials(tile, rows, columns), self._row.factors(rows)
            return values.mul_(factors + self._column.factors(columns) if self._with_columns else factors)
        of_rows, of_columns = self._logits(tile, rows, columns)
        if not self._with_columns:
            return self._row.softmax(of_rows, rows, of_rows).mul_(self._row.factors(rows))
        share = self._column.softmax(of_columns, columns, self._spare.like(tile)).mul_(self._column.factors(columns))
        return share.addcmul_(self._row.softmax(of_rows, rows, of_rows), self._row.factors(rows))

    def _exponentials(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        if _are_factors(self._row_weights):
            values = tile.mul_(_LOG2E).exp2_()
            for weights in self._row_weights:
                weights.multiply(values, values, rows, columns)
            return values
        return _weighed(tile, tile, self._row_weights, rows, columns).mul_(_LOG2E).exp2_()

    def _logits(self, tile: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """What rows and columns sum up: the tile itself; columns the spare one where their weights differ."""
        of_columns = tile
        if not self._same_weights:
            of_columns = _weighed(self._spare.like(tile).copy_(tile), tile, self._column_weights, rows, columns)
        return _weighed(tile, tile, self._row_weights, rows, columns), of_columns


class _ScaledLogSumExp(TileKernel):
    """Row and column statistics with a scale a line: two logits an entry, from one product.

    In range, exponentials need no reference, and most weights are factors of them.
    """

    def __init__(
        self, weights: tuple[Weights, Weights], row_scale: Tensor, column_scale: Tensor, *, in_range: bool
    ) -> None:
        self._weights = weights
        self._scales = row_scale, column_scale
        self._in_range = in_range and all(map(_are_factors, weights))
        self._spare = Scratch(), Scratch(), Scratch()

    def begin(self, like: Tensor) -> None:
        self._sums = tuple(
            _Running(len(scale), like, dim, fixed=self._in_range)
            for scale, dim in zip(self._scales, (1, 0), strict=True)
        )

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        for side, lines in enumerate((rows, columns)):
            sums = self._sums[side]
            if self._in_range:
                values = self._exponentials(side, tile, rows, columns)
                sums.total[lines] += values.sum(1 - side)
            else:
                logits = self._logits(side, tile, rows, columns)
                sums.add(logits, lines, logits)

    def finish(self) -> tuple[Tensor, ...]:
        return tuple(sums.log_sum_exp() for sums in self._sums)

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        for sums, gradient in zip(self._sums, gradients, strict=True):
            sums.begin_backward(gradient)
        self._d_scales = tuple(torch.zeros_like(gradient) for gradient in gradients)

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        parts = []
        for side, lines in enumerate((rows, columns)):
            sums = self._sums[side]
            if self._in_range:
                values = self._exponentials(side, tile, rows, columns)
            else:
                logits = self._logits(side, tile, rows, columns)
                values = sums.softmax(logits, lines, logits)
            factors = sums.factors(lines)
            weighted = torch.mul(values, tile, out=self._spare[2].like(tile)).sum(1 - side)
            self._d_scales[side][lines] += weighted * factors.squeeze(1 - side)
            parts.append((values, factors * self._of_lines(side, lines)))
        (of_rows, row_factors), (of_columns, column_factors) = parts
        return of_rows.mul_(row_factors).addcmul_(of_columns, column_factors)

    def parameter_gradients(self) -> tuple[Tensor, ...]:
        return self._d_scales

    def _of_lines(self, side: int, lines: slice) -> Tensor:
        """The scales as a column (side 0) or as a row."""
        return self._scales[side][lines].unsqueeze(1 - side)

    def _logits(self, side: int, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        scale = self._of_lines(side, columns if side else rows)
        logits = torch.mul(tile, scale, out=self._spare[side].like(tile))
        return _weighed(logits, tile, self._weights[side], rows, columns)

    def _exponentials(self, side: int, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        scale = self._of_lines(side, columns if side else rows) * _LOG2E
        values = torch.mul(tile, scale, out=self._spare[side].like(tile)).exp2_()
        for weights in self._weights[side]:
            weights.multiply(values, tile, rows, columns)
        return values


def _are_factors(weights: Weights) -> bool:
    """Whether all of them multiply values without going through logarithms."""
    return all(type(some).multiply is not EntryWeights.multiply for some in weights)


def _weighed(logits: Tensor, tile: Tensor, weights: Weights, rows: slice, columns: slice) -> Tensor:
    for some in weights:
        some.add_logs(logits, tile, rows, columns)
    return logits


class _Running:
    """Sums of exponentials over a dimension, against a reference that follows the largest logit, or stays at 0.

    Reference and sum stay apart: their logarithm is large where logits are, and its rounding would be in each softmax.
    """

    def __init__(self, size: int, like: Tensor, dim: int, *, fixed: bool) -> None:
        lowest = torch.finfo(like.dtype).min / 2  # finite to base 2 as well
        self._reference = like.new_full((size,), 0.0 if fixed else lowest)
        self._dim = dim
        self.total = like.new_zeros(size)

    def add(self, logits: Tensor, lines: slice, out: Tensor) -> None:
        """Add a tile's logits to its lines; `out`, which may be the logits, is overwritten."""
        reference, total = self._reference[lines], self.total[lines]
        new = torch.maximum(reference, logits.amax(self._dim))
        total *= (reference - new).exp()
        reference.copy_(new)
        total += self.softmax(logits, lines, out).sum(self._dim)

    def log_sum_exp(self) -> Tensor:
        """The result; -inf where nothing was added."""
        return self._reference + self.total.log()

    def softmax(self, logits: Tensor, lines: slice, out: Tensor) -> Tensor:
        """exp(logits - reference) of a tile in `out`, in one pass and the power of 2; a softmax but for the sum."""
        reference = (self._reference[lines] * -_LOG2E).unsqueeze(self._dim)
        return torch.add(reference, logits, alpha=_LOG2E, out=out).exp2_()

    def begin_backward(self, gradient: Tensor) -> None:
        """Take the gradient of the result; what nothing was added to has none."""
        self._factors = torch.where(self.total > 0, gradient / self.total, 0.0)

    def factors(self, lines: slice) -> Tensor:
        """Gradient over sum of each line, as a column or as a row."""
        return self._factors[lines].unsqueeze(self._dim)
