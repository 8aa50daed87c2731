"""The second fixture of the geometry terms, and definitions written out entry by entry."""

import math

import torch
from torch import Tensor

IMAGE = ((1.0, 0.0), (0.0, 1.0))
TEXT = ((0.8, 0.6), (0.6, 0.8))


def fixture() -> tuple[Tensor, Tensor]:
    """Two images and their texts, of length 1."""
    return torch.tensor(IMAGE, dtype=torch.float64), torch.tensor(TEXT, dtype=torch.float64)


def log_mean_potential(u: Tensor, v: Tensor, t: float = 2.0) -> Tensor:
    """log mean_{i != j} exp(-t |u_i - v_j|^2)."""
    entries = [torch.exp(-t * (u[i] - v[j]).square().sum()) for i in range(len(u)) for j in range(len(v)) if i != j]
    return torch.stack(entries).mean().log()


def turned(rows: Tensor, angle: float) -> Tensor:
    """Rows of a plane, turned."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return rows @ rows.new_tensor([[cosine, sine], [-sine, cosine]])
