"""Sums of softplus over tiles: the double loop's value and gradients, exact at both ends."""

import math

import pytest
import torch
from torch import Tensor

from vlm.similarity.entry_weights import AtLeast, EntryWeights, EqualKeys
from vlm.similarity.softplus_sum import softplus_sum
from vlm.similarity.tiles import Columns


def leaves(num_rows: int, num_columns: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randn(num_rows + num_columns, 8, dtype=torch.float64, generator=generator)
    drawn = drawn / drawn.norm(dim=1, keepdim=True)
    scale, bias = torch.tensor([12.0]), torch.tensor([-5.0])
    return [leaf.to(dtype).requires_grad_() for leaf in (drawn[:num_rows], drawn[num_rows:], scale, bias)]


def gradients(sums: Tensor, of: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(0.5, 2.0, len(sums), dtype=sums.dtype)
    return list(torch.autograd.grad((sums * upstream).sum(), of))


@pytest.mark.parametrize("weights", ["none", "equal_keys", "at_least"])
def test_many_tiles_equal_the_dense_sum(weights: str) -> None:
    """Two tiles by two, uneven, with entries left out: value and gradients of rows, columns, scale and bias."""
    rows, columns, scale, bias = leaves(600, 1100)
    logits = scale * rows @ columns.T + bias
    kept = torch.ones_like(logits)
    chosen: tuple[EntryWeights, ...] = ()
    if weights == "equal_keys":
        row_keys, column_keys = torch.arange(600) % 90, torch.arange(1100) % 300
        kept = (row_keys[:, None] != column_keys).double()
        chosen = (EqualKeys(row_keys, column_keys),)
    if weights == "at_least":
        kept = (logits >= -4.0).double()
        chosen = (AtLeast(torch.full((600,), -4.0, dtype=torch.float64)),)
    dense = (kept * torch.log1p(logits.exp())).sum(1)
    tiled = softplus_sum(rows, Columns(columns), scale, bias, chosen)
    torch.testing.assert_close(tiled, dense, rtol=1e-12, atol=1e-12)
    of = [rows, columns, scale, bias]
    for found, expected in zip(gradients(tiled, of), gradients(dense, of), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-90.0, -30.0, 0.0, 15.0, 25.0, 39.0, 41.0, 90.0, 1000.0])
def test_one_entry_is_exact_at_both_ends(logit: float, dtype: torch.dtype) -> None:
    """log(1 + e^z) and its derivative, of whatever size: e^-90 stays, e^1000 does not overflow."""
    one = torch.ones(1, 1, dtype=dtype)
    scale, bias = torch.tensor([logit + 10], dtype=dtype), torch.tensor([-10.0], dtype=dtype, requires_grad=True)
    value = softplus_sum(one, Columns(one), scale, bias)
    (d_bias,) = torch.autograd.grad(value.sum(), bias)
    expected = max(logit, 0.0) + math.log1p(math.exp(-abs(logit)))
    derivative = math.exp(min(logit, 0.0)) / (1 + math.exp(-abs(logit)))
    tolerance = 16 * torch.finfo(dtype).eps
    assert value.item() == pytest.approx(expected, rel=tolerance)
    assert d_bias.item() == pytest.approx(derivative, rel=tolerance)


def test_low_precision_products_are_as_good_as_a_dense_low_precision_sum() -> None:
    rows, columns, scale, bias = leaves(300, 200, torch.float32)
    exact = torch.log1p((12 * rows.double() @ columns.double().T - 5).exp()).sum(1)
    dense = torch.log1p(((12 * rows).bfloat16() @ columns.bfloat16().T + bias.bfloat16()).float().exp()).sum(1)
    tiled = softplus_sum(rows, Columns(columns), scale, bias, matmul_dtype=torch.bfloat16)
    assert tiled.dtype == torch.float32
    assert ((tiled - exact) / exact).abs().mean() <= ((dense - exact) / exact).abs().mean()


def test_no_rows_have_no_sums_and_give_no_gradient() -> None:
    rows, columns, scale, bias = leaves(0, 5)
    sums = softplus_sum(rows, Columns(columns), scale, bias)
    assert sums.shape == (0,)
    assert not any(gradient.any() for gradient in torch.autograd.grad(sums.sum(), [columns, scale, bias]))
