"""Products of dimensions with dimensions: what sums of squares over the pair matrix are traces of."""

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.similarity.tiles import slices

_ROWS = 4096  # so many are float64 at a time


def gram(x: Float[Tensor, "rows a"], y: Float[Tensor, "rows b"]) -> Float[Tensor, "a b"]:
    """X^T Y of this rank's rows, in float64. Differentiable."""
    total = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for some in slices(len(x), _ROWS):
        total = total + x[some].double().T @ y[some].double()
    return total
