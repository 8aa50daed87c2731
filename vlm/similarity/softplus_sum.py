"""Sums of softplus over the rows of the pair matrix: the negatives of a sigmoid loss, without the matrix."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from vlm.similarity.entry_weights import EntryWeights
from vlm.similarity.tiles import Columns, TileKernel, reduce_tiles

_LINEAR_FROM = 40.0  # log(1 + exp(z)) is z there, to the last bit of float64


def softplus_sum(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
    weights: tuple[EntryWeights, ...] = (),
    *,
    matmul_dtype: torch.dtype | None = None,
) -> Float[Tensor, " rows"]:
    """sum_j w_ij log(1 + exp(a <x_i, y_j> + b)) of each row; a the scale, b the bias.

    Differentiable in rows, columns, scale and bias. Weights see logits as similarities. Collective with a ring.
    """
    kernel = _SoftplusSum(len(rows), bias.detach(), weights)
    return reduce_tiles(kernel, rows, columns, bias, scale=scale, matmul_dtype=matmul_dtype)[0]


def paired_softplus_sum(
    rows: Float[Tensor, "rows dim"],
    columns: Columns,
    scale: Float[Tensor, "1"],
    bias: Float[Tensor, "1"],
    weights: tuple[EntryWeights, ...] = (),
    *,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The logit a <x_i, y_i> (without b) of each row and its partner in full precision, then `softplus_sum`.

    See `paired_log_sum_exp`.
    """
    assert columns.pairs_at is not None
    kernel = _SoftplusSum(len(rows), bias.detach(), weights)
    sums, pair_logits = reduce_tiles(kernel, rows, columns, bias, scale=scale, matmul_dtype=matmul_dtype, paired=True)
    return pair_logits, sums


class _SoftplusSum(TileKernel):
    """Row sums of softplus(tile + bias), and their derivative, the sigmoid."""

    def __init__(self, num_rows: int, bias: Tensor, weights: tuple[EntryWeights, ...]) -> None:
        self._num_rows, self._bias, self._weights = num_rows, bias, weights
        self._bias_value = float(bias)

    def begin(self, like: Tensor) -> None:
        self._sums = like.new_zeros(self._num_rows)

    def accumulate(self, tile: Tensor, rows: slice, columns: slice) -> None:
        logits = tile.add_(self._bias_value)
        values = softplus(logits, threshold=_LINEAR_FROM)
        self._sums[rows] += self._weighed(values, logits, rows, columns).sum(1)

    def finish(self) -> tuple[Tensor, ...]:
        return (self._sums,)

    def begin_backward(self, gradients: tuple[Tensor, ...]) -> None:
        (self._gradient,) = gradients
        self._d_bias = self._gradient.new_zeros(1)

    def derivative(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        logits = tile.add_(self._bias_value)
        values = logits.sigmoid() if self._weights else logits.sigmoid_()
        d_tile = self._weighed(values, logits, rows, columns)
        gradient = self._gradient[rows]
        self._d_bias += gradient @ d_tile.sum(1)
        return d_tile.mul_(gradient[:, None])

    def parameter_gradients(self) -> tuple[Tensor, ...]:
        return (self._d_bias.to(self._bias.dtype),)

    def _weighed(self, values: Tensor, logits: Tensor, rows: slice, columns: slice) -> Tensor:
        for some in self._weights:
            some.multiply(values, logits, rows, columns)
        return values
