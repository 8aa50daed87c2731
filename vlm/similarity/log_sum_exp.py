"""Log-sum-exp over the rows and the columns of the pair matrix, from one product and in one pass."""

import math
from collections.abc import Callable
from typing import Any

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

    def kernel(reference: float | None) -> _LogSumExp:
        return _LogSumExp((weights, ()), (len(rows), columns.num_columns), reference, with_columns=False)

    return _reduce(kernel, _reference(rows, scale, columns), rows, columns, scale=scale, product=product)[0]


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
    reference = _reference(rows, rows.new_ones(1) if scale is None else scale, columns)

    def kernel(reference: float | None) -> _LogSumExp:
        return _LogSumExp(weights, (len(rows), columns.num_columns), reference)

    return _reduce(kernel, reference, rows, columns, scale=scale, product=product, paired=paired)


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
    reference = _reference(rows, rows.new_full((1,), largest), columns)

    def kernel(reference: float | None) -> _ScaledLogSumExp:
        return _ScaledLogSumExp(weights, *scales, reference)

    row, column = _reduce(kernel, reference, rows, columns, row_scale, column_scale, product=product)
    return row, column


# exp(+-40) leaves room in fp32 for a sum of 2^60 of the largest, and for 2^60 between the smallest and zero.
_LARGEST_IN_RANGE = 40.0
# Beyond that the largest possible logit becomes exp(60), with room for a sum of 2^40 such, and afterwards one must look
# whether some line's logits were so small that their exponentials were lost.
_LARGEST_WITH_REFERENCE, _HIGHEST = 120.0, 60.0
_KEPT = 2.0**30  # how far each sum has to be above what may be missing in it
_LOG2E = math.log2(math.e)  # powers of 2 take a third of exp's time on CPUs


@torch.no_grad()
def _reference(rows: Tensor, scale: Tensor, columns: Columns) -> float | None:
    """What to subtract from all logits before exp, by the largest that there can be. Collective with a ring.

    0 where no exponential can leave the range of fp32; None where no one number will do.
    """
    largest = columns.largest_norm()
    bound = float((rows.norm(dim=1) * scale).abs().max() * largest) if len(rows) else 0.0
    if bound < _LARGEST_IN_RANGE:
        return 0.0
    return bound - _HIGHEST if bound < _LARGEST_WITH_REFERENCE else None


def _reduce(
    kernel: Callable[[float | None], "_LogSumExp | _ScaledLogSumExp"],
    reference: float | None,
    rows: Tensor,
    columns: Columns,
    *parameters: Tensor,
    **how: Any,
) -> tuple[Tensor, ...]:
    """`reduce_tiles` with one reference for all logits; where that has lost some, again with running maxima."""
    tried = kernel(reference)
    results = reduce_tiles(tried, rows, columns, *parameters, **how)
    if reference == 0.0 and columns.ring is None:
        return results
    lost = rows.new_tensor([float(tried.lost_digits())])
    if columns.ring is not None:  # all of its ranks go round again, or none
        lost = columns.ring.ranks.largest(lost)
    return reduce_tiles(kernel(None), rows, columns, *parameters, **how) if bool(lost.any()) else results


class _LogSumExp(TileKernel):
    """Row and column statistics of logits that are the tile itself.

    With a reference for all, one exponential serves both directions; else each has its own running maximum.
    """

    def __init__(
        self,
        weights: tuple[Weights, Weights],
        sizes: tuple[int, int],
        reference: float | None,
        *,
        with_columns: bool = True,
    ) -> None:
        self._row_weights, self._column_weights = weights
        self._sizes = sizes
        self._with_columns = with_columns
        self._same_weights = weights[0] is weights[1] or not with_columns
        self._reference = reference if self._same_weights else None
        self._spare = Scratch()

    def begin(self, like: Tensor) -> None:
        num_rows, num_columns = self._sizes
        self._row = _Running(num_rows, like, 1, self._reference)
        self._column = _Running(num_columns if self._with_columns else 0, like, 0, self._reference)

    def lost_digits(self) -> bool:
        """Whether a line's sum is so small that it misses something of weight."""
        num_rows, num_columns = self._sizes
        return self._row.lost_digits(num_columns) or self._column.lost_digits(num_rows)

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        if self._reference is not None:
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
        if self._reference is not None:
            values, factors = self._exponentials(tile, rows, columns), self._row.factors(rows)
            return values.mul_(factors + self._column.factors(columns) if self._with_columns else factors)
        of_rows, of_columns = self._logits(tile, rows, columns)
        if not self._with_columns:
            return self._row.softmax(of_rows, rows, of_rows).mul_(self._row.factors(rows))
        share = self._column.softmax(of_columns, columns, self._spare.like(tile)).mul_(self._column.factors(columns))
        return share.addcmul_(self._row.softmax(of_rows, rows, of_rows), self._row.factors(rows))

    def _exponentials(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        if not _are_factors(self._row_weights):
            return self._row.softmax(_weighed(tile, tile, self._row_weights, rows, columns), rows, tile)
        values = self._row.softmax(tile, rows, tile)
        for weights in self._row_weights:
            weights.multiply(values, values, rows, columns)
        return values

    def _logits(self, tile: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """What rows and columns sum up: the tile itself; columns the spare one where their weights differ."""
        of_columns = tile
        if not self._same_weights:
            of_columns = _weighed(self._spare.like(tile).copy_(tile), tile, self._column_weights, rows, columns)
        return _weighed(tile, tile, self._row_weights, rows, columns), of_columns


class _ScaledLogSumExp(TileKernel):
    """Row and column statistics with a scale a line: two logits an entry, from one product.

    With a reference for all, most weights are factors of exponentials.
    """

    def __init__(
        self, weights: tuple[Weights, Weights], row_scale: Tensor, column_scale: Tensor, reference: float | None
    ) -> None:
        self._weights = weights
        self._scales = row_scale, column_scale
        self._reference = reference if all(map(_are_factors, weights)) else None
        self._spare = Scratch(), Scratch(), Scratch()

    def begin(self, like: Tensor) -> None:
        self._sums = tuple(
            _Running(len(scale), like, dim, self._reference) for scale, dim in zip(self._scales, (1, 0), strict=True)
        )

    def lost_digits(self) -> bool:
        """Whether a line's sum is so small that it misses something of weight."""
        return any(sums.lost_digits(len(others)) for sums, others in zip(self._sums, self._scales[::-1], strict=True))

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        for side, lines in enumerate((rows, columns)):
            sums = self._sums[side]
            if self._reference is not None:
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
            if self._reference is not None:
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
        values = torch.mul(tile, scale, out=self._spare[side].like(tile))
        if self._reference:
            values -= self._reference * _LOG2E
        values.exp2_()
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
    """Sums of exponentials over a dimension, against a reference that follows the largest logit, or is one number.

    Reference and sum stay apart: their logarithm is large where logits are, and its rounding would be in each softmax.
    """

    def __init__(self, size: int, like: Tensor, dim: int, fixed: float | None) -> None:
        lowest = torch.finfo(like.dtype).min / 2  # finite to base 2 as well
        self._fixed = fixed
        self._reference = like.new_full((size,), lowest if fixed is None else fixed)
        self._dim = dim
        self.total = like.new_zeros(size)

    def add(self, logits: Tensor, lines: slice, out: Tensor) -> None:
        """Add a tile's logits to its lines; `out`, which may be the logits, is overwritten."""
        reference, total = self._reference[lines], self.total[lines]
        new = torch.maximum(reference, logits.amax(self._dim))
        total *= (reference - new).exp()
        reference.copy_(new)
        total += self.softmax(logits, lines, out).sum(self._dim)

    def lost_digits(self, entries: int) -> bool:
        """Whether a sum is so near to the smallest numbers that what vanished of its `entries` may matter."""
        if not self._fixed or not len(self.total):
            return False
        least = torch.finfo(self.total.dtype).tiny * _KEPT * max(entries, 1)
        return bool(self.total.min() < least)

    def log_sum_exp(self) -> Tensor:
        """The result; -inf where nothing was added."""
        return self._reference + self.total.log()

    def softmax(self, logits: Tensor, lines: slice, out: Tensor) -> Tensor:
        """exp(logits - reference) of a tile in `out`, in one pass and the power of 2; a softmax but for the sum."""
        if self._fixed == 0.0:
            return torch.mul(logits, _LOG2E, out=out).exp2_()
        reference = (self._reference[lines] * -_LOG2E).unsqueeze(self._dim)
        return torch.add(reference, logits, alpha=_LOG2E, out=out).exp2_()

    def begin_backward(self, gradient: Tensor) -> None:
        """Take the gradient of the result; what nothing was added to has none."""
        self._factors = torch.where(self.total > 0, gradient / self.total, 0.0)

    def factors(self, lines: slice) -> Tensor:
        """Gradient over sum of each line, as a column or as a row."""
        return self._factors[lines].unsqueeze(self._dim)
