"""Sums under soft targets: a float64 double loop's values and gradients, whatever the tiles and the ranks."""

import pytest
import torch
from torch import Tensor

from vlm.similarity import tiles
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.log_sum_exp import log_sum_exp
from vlm.similarity.soft_targets import FunctionTargets, SoftmaxTargets, SoftTargets, target_sums
from vlm.similarity.tiles import Columns

N, M, SCALE = 9, 7, 3.0
COUNTS = (4, 2, 3)


def rows_of(count: int, dim: int, seed: int) -> Tensor:
    rows = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def cubed(products: Tensor) -> Tensor:
    return products**3


def targets_of(kind: str, p: Tensor, q: Tensor) -> tuple[SoftTargets, Tensor, Tensor]:
    """Targets, and the weights of rows and columns written out."""
    products = torch.stack([torch.stack([a @ b for b in q]) for a in p])
    if kind == "function":
        return FunctionTargets(p, q, cubed), products**3, products**3
    row_logs, column_logs = torch.logsumexp(SCALE * products, 1) + 0.5, torch.logsumexp(SCALE * products, 0) + 0.25
    row_logs[2] = float("inf")
    row_targets = torch.softmax(SCALE * products, 1) * torch.exp(torch.tensor(-0.5, dtype=torch.float64))
    column_targets = torch.softmax(SCALE * products, 0) * torch.exp(torch.tensor(-0.25, dtype=torch.float64))
    row_targets[2] = 0.0
    return SoftmaxTargets(SCALE * p, q, row_logs, column_logs), row_targets, column_targets


@pytest.mark.parametrize("kind", ["function", "softmax"])
@pytest.mark.parametrize("with_columns", [True, False])
@pytest.mark.parametrize("tile", [(512, 1024), (4, 3)])
def test_sums_totals_and_gradients_equal_a_double_loop(
    monkeypatch: pytest.MonkeyPatch, kind: str, with_columns: bool, tile: tuple[int, int]
) -> None:
    monkeypatch.setattr(tiles, "_TILE_ROWS", tile[0])
    monkeypatch.setattr(tiles, "_TILE_COLUMNS", tile[1])
    x, y = rows_of(N, 5, 0).requires_grad_(), rows_of(M, 5, 1).requires_grad_()
    targets, row_targets, column_targets = targets_of(kind, rows_of(N, 3, 2), rows_of(M, 3, 3))
    row_keys, column_keys = torch.tensor([0, 1, 2, 3, 1, 1, 5, 6, 9]), torch.tensor([0, 1, 2, 3, 1, 7, 8])
    others = (EqualKeys(row_keys, column_keys),)
    left = row_keys[:, None] != column_keys[None]
    row_targets, column_targets = row_targets * left, column_targets * left
    if not with_columns:
        column_targets = column_targets[:, :0]
    found = target_sums(x, Columns(y), targets, others, with_columns=with_columns)
    z = torch.stack([torch.stack([a @ b for b in y]) for a in x])
    sums = (row_targets * z).sum(1), (column_targets * z[:, : column_targets.shape[1]]).sum(0)
    for one, expected in ((found.rows, sums[0]), (found.columns, sums[1])):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.row_totals, row_targets.sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.column_totals, column_targets.sum(0), rtol=1e-12, atol=1e-12)
    factors = torch.linspace(-1, 2, N + column_targets.shape[1], dtype=torch.float64)
    gradients = [
        torch.autograd.grad((torch.cat([a, b]) * factors).sum(), (x, y)) for a, b in (sums, (found.rows, found.columns))
    ]
    for expected, one in zip(*gradients, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


def test_low_precision_weights_still_sum_to_one() -> None:
    """With log-sum-exps of the same rounded products."""
    p, q, scale = rows_of(N, 3, 2).float(), rows_of(N, 3, 3).float(), torch.tensor([100.0])
    row_logs, column_logs = log_sum_exp(p, Columns(q), scale, matmul_dtype=torch.bfloat16)
    sums = target_sums(p, Columns(q), SoftmaxTargets(p * scale, q, row_logs, column_logs), matmul_dtype=torch.bfloat16)
    torch.testing.assert_close(sums.row_totals, torch.ones(N), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.column_totals, torch.ones(N), rtol=1e-5, atol=0)
