"""The tile loop: what it multiplies, and what it keeps from the forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.similarity import tiles
from vlm.similarity.log_sum_exp import log_sum_exp
from vlm.similarity.tiles import Columns

ROWS, COLUMNS, DIM = 12, 10, 6


def sides() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(size, DIM, generator=generator, dtype=torch.float64) for size in (ROWS, COLUMNS))
    return (
        rows.requires_grad_(),
        columns.requires_grad_(),
        torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True),
    )


def value(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    per_row, per_column = log_sum_exp(rows, Columns(columns), scale)
    return per_row.square().sum() + per_column.square().sum()


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
