"""Statistics under a scale a line: those of the dense matrix, over many tiles and at temperatures apart by 200."""

import torch
from torch import Tensor

from vlm.distributed.row_group import RowGroup
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.softmax_moments import softmax_statistics
from vlm.similarity.tiles import Columns


def unit_rows(count: int, dim: int, seed: int) -> Tensor:
    rows = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def test_rows_and_columns_over_several_tiles_equal_the_dense_matrix() -> None:
    count = 1100  # three tiles of rows, two of columns
    x, y = (unit_rows(count, 8, seed).requires_grad_() for seed in (0, 1))
    scales = torch.logspace(0, 2.3, count, dtype=torch.float64), torch.logspace(2.3, 0, count, dtype=torch.float64)
    keys = torch.arange(count) % 900
    weigh = torch.randn(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    found = softmax_statistics(x, Columns(y), RowGroup(None, 0, (count,)), scales, (EqualKeys(keys, keys),))
    loss = (found[0].log_sum_exp * weigh[0] + found[1].log_sum_exp * weigh[1]).sum()
    gradients = torch.autograd.grad(loss, (x, y))

    similarity = x @ y.T
    left_out = keys[:, None] == keys[None, :]
    dense = torch.zeros((), dtype=torch.float64)
    for side, matrix in enumerate((similarity, similarity.T)):
        logits = (matrix * scales[side][:, None]).masked_fill(left_out, float("-inf"))
        torch.testing.assert_close(found[side].log_sum_exp, logits.logsumexp(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[side].mean, (logits.softmax(1) * matrix).sum(1).detach(), rtol=1e-11, atol=0)
        dense = dense + (logits.logsumexp(1) * weigh[side]).sum()
    for one, other in zip(gradients, torch.autograd.grad(dense, (x, y)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_line_without_entries_is_minus_infinity_with_a_mean_of_zero() -> None:
    x = unit_rows(3, 4, 0).requires_grad_()
    keys = torch.zeros(3, dtype=torch.int64)
    ones = torch.ones(3, dtype=torch.float64)
    found = softmax_statistics(x, Columns(x.detach()), RowGroup(None, 0, (3,)), (ones, ones), (EqualKeys(keys, keys),))
    for side in found:
        assert side.log_sum_exp.tolist() == [-float("inf")] * 3
        assert side.mean.tolist() == [0.0] * 3
    found[0].log_sum_exp.where(torch.tensor(False), torch.tensor(0.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() == 0
