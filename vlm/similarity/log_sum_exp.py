"""Log-sum-exp over the rows and the columns of the pair matrix, from one product and in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.log_sum_exp_kernels import LogSumExp, Weights
from vlm.similarity.tiles import Columns, reduce_tiles
from vlm.similarity.triton.dispatch import common_keys, fused_reduction


def row_log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    scale: Float[Tensor, " rows_or_1"],
    weights: Weights = (),
    *,
    matmul_dtype: torch.dtype | None = None,
) -> Float[Tensor, " rows"]:
    """log sum_j w_ij exp(scale_i <x_i, y_j>) of each row; -inf where no entry counts.

    `scale` is one number, or one a row. Differentiable in rows, columns and scale. Weights see logits as similarities.
    """

    def kernel(reference: float | None) -> LogSumExp:
        return LogSumExp((weights, ()), (len(rows), columns.num_columns), reference, with_columns=False)

    return _reduce(kernel, _reference(rows, scale, columns), rows, columns, scale=scale, matmul_dtype=matmul_dtype)[0]


def log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    scale: Float[Tensor, "1"],
    row_weights: Weights = (),
    column_weights: Weights | None = None,
    *,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """Of each row log sum_j w_ij exp(a <x_i, y_j>), of each column log sum_i w'_ij exp(a <x_i, y_j>); a the scale.

    Columns are summed over this rank's rows only: `RowGroup.merge_log_sum_exp` puts the ranks' parts together. w' is w
    where it is not given; -inf where no entry counts. Differentiable in rows, columns and scale. Weights see logits as
    similarities. Fused kernels run where they are right and faster (`vlm.similarity.triton.dispatch`).
    """
    fused = _fused(rows, columns, row_weights, column_weights, matmul_dtype)
    if fused is not None:
        return fused(rows * scale)
    row, column = _tiled(rows, columns, scale, row_weights, column_weights, matmul_dtype)
    return row, column


def _fused(
    rows: Tensor,
    columns: Columns,
    row_weights: Weights,
    column_weights: Weights | None,
    matmul_dtype: torch.dtype | None,
) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Fused kernels as a function of the scaled rows, where they are to run."""
    keys = None if columns.ring else common_keys(row_weights, column_weights)
    fused = None if keys is None else fused_reduction(rows, columns.num_columns, matmul_dtype, _of_keys)
    if fused is None or keys is None:
        return None
    row_keys, column_keys = keys
    return lambda scaled: fused(scaled, columns.rows, row_keys, column_keys, matmul_dtype)


def _tiled(
    rows: Tensor,
    columns: Columns,
    scale: Tensor | None,
    row_weights: Weights,
    column_weights: Weights | None,
    matmul_dtype: torch.dtype | None,
    *,
    paired: bool = False,
) -> tuple[Tensor, ...]:
    weights = (row_weights, row_weights if column_weights is None else column_weights)
    reference = _reference(rows, rows.new_ones(1) if scale is None else scale, columns)

    def kernel(reference: float | None) -> LogSumExp:
        return LogSumExp(weights, (len(rows), columns.num_columns), reference)

    return _reduce(kernel, reference, rows, columns, scale=scale, matmul_dtype=matmul_dtype, paired=paired)


def _of_keys(
    rows: Tensor, columns: Tensor, row_keys: Tensor | None, column_keys: Tensor | None, matmul_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The sums of fused kernels, in plain torch."""
    weights = () if row_keys is None or column_keys is None else (EqualKeys(row_keys, column_keys),)
    row, column = _tiled(rows, Columns(columns), None, weights, None, matmul_dtype)
    return row, column


def paired_log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    scale: Float[Tensor, "1"],
    row_weights: Weights = (),
    column_weights: Weights | None = None,
    *,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " columns"]]:
    """The logit a <x_i, y_i> of each row and its partner in full precision, then what `log_sum_exp` gives.

    One backward pass for all three: a product of its own would hold the gradients of rows and columns a second time.
    Columns have to say where the partners are (`Columns.pairs_at`).
    """
    assert columns.pairs_at is not None
    if _fused(rows, columns, row_weights, column_weights, matmul_dtype) is not None:
        partners = columns.rows[columns.pairs_at : columns.pairs_at + len(rows)]
        pair_logits = scale * (rows * partners).sum(1)
        return pair_logits, *log_sum_exp(rows, columns, scale, row_weights, column_weights, matmul_dtype=matmul_dtype)
    row, column, pair_logits = _tiled(rows, columns, scale, row_weights, column_weights, matmul_dtype, paired=True)
    return pair_logits, row, column


# exp(+-40) leaves room in fp32 for a sum of 2^60 of the largest, and for 2^60 between the smallest and zero.
_LARGEST_IN_RANGE = 40.0
# Beyond that the largest possible logit becomes exp(60), with room for a sum of 2^40 such, and afterwards one must look
# whether some line's logits were so small that their exponentials were lost.
_LARGEST_WITH_REFERENCE, _HIGHEST = 120.0, 60.0


@torch.no_grad()
def _reference(rows: Tensor, scale: Tensor, columns: Columns) -> float | None:
    """A number to subtract from all logits before exp, by the largest that there can be. Collective with a ring.

    0 where no exponential can leave the range of fp32; None where no one number will do.
    """
    largest = columns.largest_norm()
    bound = float((rows.norm(dim=1) * scale).abs().max() * largest) if len(rows) else 0.0
    if bound < _LARGEST_IN_RANGE:
        return 0.0
    return bound - _HIGHEST if bound < _LARGEST_WITH_REFERENCE else None


def _reduce(
    kernel: Callable[[float | None], LogSumExp],
    reference: float | None,
    rows: Tensor,
    columns: Columns,
    **how: Any,
) -> tuple[Tensor, ...]:
    """`reduce_tiles` with one reference for all logits; where that has lost some, again with running maxima."""
    tried = kernel(reference)
    results = reduce_tiles(tried, rows, columns, **how)
    if reference == 0.0 and columns.ring is None:
        return results
    lost = rows.new_tensor([float(tried.lost_digits())])
    if columns.ring is not None:  # all of its ranks go round again, or none
        lost = columns.ring.ranks.largest(lost)
    return reduce_tiles(kernel(None), rows, columns, **how) if bool(lost.any()) else results
