"""The inverse square root of covariances, with a gradient that repeated eigenvalues do not disturb."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def inverse_root(matrices: Float[Tensor, "... dim dim"]) -> Float[Tensor, "... dim dim"]:
    """S^-1/2 of symmetric positive definite matrices, itself symmetric. Differentiable once.

    With S = V diag(l) V^T its derivative in direction E is V (F * (V^T E V)) V^T, F_ij = (l_i^-1/2 - l_j^-1/2) /
    (l_i - l_j) (Daleckii & Krein, 1965). For this function the quotient is -1 / (r_i r_j (r_i + r_j)) with r = l^1/2:
    no difference of eigenvalues is left to divide by.
    """
    root: Tensor = _InverseRoot.apply(matrices)
    return root


class _InverseRoot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        # eigh raises where a number is none; its result is none either.
        finite = matrices.isfinite().all(-1).all(-1)[..., None, None]
        values, vectors = torch.linalg.eigh(torch.where(finite, matrices, torch.eye(matrices.shape[-1]).to(matrices)))
        # Rounding may leave the smallest a little below what the caller has added to all.
        roots = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
        vectors = torch.where(finite, vectors, torch.nan)
        ctx.save_for_backward(roots, vectors)
        inverse: Tensor = (vectors / roots[..., None, :]) @ vectors.mT
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        i, j = roots[..., :, None], roots[..., None, :]
        symmetric = (gradient + gradient.mT) / 2
        inner = (vectors.mT @ symmetric @ vectors) / (i * j * (i + j))
        matrix_gradients: Tensor = -(vectors @ inner @ vectors.mT)
        return matrix_gradients
