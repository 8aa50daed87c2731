"""The tile loop: what it multiplies, what it keeps from the forward pass, and in which precision."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.similarity import tiles
from vlm.similarity.log_sum_exp import log_sum_exp
from vlm.similarity.tiles import Columns

ROWS, COLUMNS, DIM = 12, 10, 6


def sides(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(size, DIM, generator=generator, dtype=dtype) for size in (ROWS, COLUMNS))
    return rows.requires_grad_(), columns.requires_grad_(), torch.full((1,), 2.0, dtype=dtype, requires_grad=True)


def value(rows: Tensor, columns: Tensor, scale: Tensor, matmul_dtype: torch.dtype | None = None) -> Tensor:
    return sum(part.square().sum() for part in log_sum_exp(rows, Columns(columns), scale, matmul_dtype=matmul_dtype))  # type: ignore[return-value]


def dense(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    logits = scale * rows @ columns.T
    return logits.logsumexp(1).square().sum() + logits.logsumexp(0).square().sum()


class Products(TorchDispatchMode):
    """The numbers multiplied by matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiplied = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.multiplied += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("size", "limit", "products"), [("_TILE_ROWS", ROWS, 3), ("_TILE_ROWS", ROWS // 2, 4), ("_MOST_KEPT", 119, 4)]
)
def test_one_small_tile_alone_is_not_multiplied_again(
    size: str, limit: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, size, limit)
    inputs = sides()
    with Products() as counter:
        torch.autograd.grad(value(*inputs), inputs)
    assert counter.multiplied == products * ROWS * COLUMNS * DIM


def test_a_tile_that_was_kept_serves_every_backward_pass() -> None:
    inputs = sides()
    expected = torch.autograd.grad(dense(*inputs), inputs)
    made = value(*inputs)
    for _ in range(2):
        found = torch.autograd.grad(made, inputs, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_few_entries_are_multiplied_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = sides(torch.float32)
    precise, asked = value(*inputs), value(*inputs, torch.bfloat16)
    monkeypatch.setattr(tiles, "_FEW_ENTRIES", ROWS * COLUMNS - 1)
    rounded = value(*inputs, torch.bfloat16)
    assert asked == precise != rounded
    torch.testing.assert_close(rounded, precise, rtol=0.02, atol=0)
