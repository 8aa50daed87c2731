"""The inverse root of a matrix: against scipy, and its gradient where eigenvalues repeat."""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from vlm.objectives.terms.inverse_root import inverse_root


def covariance(dim: int, seed: int) -> Tensor:
    rows = torch.randn(3 * dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows / len(rows)


def symmetrised_root(matrix: Tensor) -> Tensor:
    """Finite differences step out of the symmetric matrices."""
    return inverse_root((matrix + matrix.mT) / 2)


def test_is_the_inverse_of_scipys_root() -> None:
    matrices = torch.stack([covariance(5, seed) for seed in range(3)])
    for matrix, found in zip(matrices, inverse_root(matrices), strict=True):
        expected = np.linalg.inv(scipy.linalg.sqrtm(matrix.numpy()))
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-11)


def test_gradients_are_those_of_finite_differences_where_eigenvalues_repeat() -> None:
    """Torch's own gradient of eigenvectors divides by the difference of equal eigenvalues."""
    turned = torch.linalg.qr(covariance(4, 7)).Q
    matrices = [torch.eye(4).double(), turned @ torch.diag(torch.tensor([2.0, 2, 0.5, 0.5]).double()) @ turned.T]
    for matrix in (*matrices, covariance(4, 1)):
        assert torch.autograd.gradcheck(symmetrised_root, matrix.clone().requires_grad_(), eps=1e-6, atol=1e-6)
    weights, identity = torch.arange(16).double().view(4, 4), torch.eye(4).double().requires_grad_()
    values, vectors = torch.linalg.eigh(identity)
    (torchs,) = torch.autograd.grad(((vectors / values.sqrt()) @ vectors.mT * weights).sum(), identity)
    assert not torchs.isfinite().all()
