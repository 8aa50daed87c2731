"""A differentiable sorting network: where sorting puts each value, as a matrix of masses instead of a permutation."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def soft_sort(
    values: Float[Tensor, "rows size"], steepness: float = 1.0
) -> tuple[Float[Tensor, "rows size"], Float[Tensor, "rows size size"]]:
    """Values in soft ascending order, and Q with Q[i, k] the mass of value i on rank k; rows and columns of Q sum to 1.

    An odd-even network: `size` layers compare neighbours (a, b), and swap them by the amount 1 - f(b - a), where
    f(x) = 1/2 + atan(steepness x) / pi. (Monotonic Differentiable Sorting Networks, Petersen et al., 2022.)
    O(rows size^3) operations.
    """
    count, size = values.shape
    masses = torch.eye(size, dtype=values.dtype, device=values.device).expand(count, size, size)
    for layer in range(size):
        first = layer % 2
        pairs = (size - first) // 2
        if pairs == 0:
            continue
        stays = _stays(values, first, pairs, steepness)
        values = _compared(values, stays, first)
        masses = _compared(masses, stays[:, None], first)
    return values, masses


def _stays(values: Tensor, first: int, pairs: int, steepness: float) -> Tensor:
    """How far each compared pair is in order already."""
    neighbours = values[:, first : first + 2 * pairs]
    return 0.5 + torch.atan(steepness * (neighbours[:, 1::2] - neighbours[:, ::2])) / math.pi


def _compared(values: Tensor, stays: Tensor, first: int) -> Tensor:
    """The last dimension after one layer, whose pairs begin at `first`."""
    end = first + 2 * stays.shape[-1]
    a, b = values[..., first:end:2], values[..., first + 1 : end : 2]
    low, high = torch.lerp(b, a, stays), torch.lerp(a, b, stays)
    between = torch.stack([low, high], -1).flatten(-2)
    return torch.cat([values[..., :first], between, values[..., end:]], -1)
