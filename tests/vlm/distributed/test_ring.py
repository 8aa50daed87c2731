"""Columns that are gathered or pass by in a ring: the log-sum-exps of one process that holds all rows."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.similarity.double_loop import defined, problem
from vlm.distributed.row_group import RowGroup
from vlm.distributed.world import World
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.exchange import Exchange
from vlm.similarity.log_sum_exp import log_sum_exp

UNEVEN: dict[int, tuple[int, ...]] = {2: (7, 4), 3: (2, 5, 4), 4: (3, 1, 5, 2)}
N = 11
SCALE = 60.0
PARTS = ("row", "column", "d_rows", "d_columns", "d_scale")
SETTINGS: dict[str, dict[str, Any]] = {
    "gather": {"exchange": "gather"},
    "ring": {"exchange": "ring"},
    "gather in bf16": {"exchange": "gather", "wire": "bf16"},
    "ring in bf16": {"exchange": "ring", "wire": "bf16"},
}
GROUPED: dict[str, dict[str, Any]] = {
    "gather in groups": {"exchange": "gather", "group_ranks": 2},
    "ring in groups": {"exchange": "ring", "group_ranks": 2},
}

Results = dict[str, Tensor]


def on_this_rank(counts: tuple[int, ...], settings: dict[str, dict[str, Any]]) -> dict[str, Results]:
    """Log-sum-exps over other samples under each setting, and the gradients of a sum of all ranks' results."""
    world = World.current()
    own = RowGroup(None, world.rank, counts).local
    results = {}
    for name, setting in settings.items():
        exchange = Exchange(world, SimilarityConfig(**setting))
        ranks, total = exchange.count(own.stop - own.start)
        assert total == N
        of = problem(N, N, SCALE)
        rows, columns = (part[own].clone().requires_grad_() for part in (of.rows, of.columns))
        scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
        keys = torch.arange(N)[own]
        others = (EqualKeys(keys, ranks.gather_constant(keys)),)
        row, parts = log_sum_exp(rows, exchange.columns(columns, ranks), scale, others)
        column = ranks.merge_log_sum_exp(parts)
        weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)[own]
        gradients = torch.autograd.grad((row, column), (rows, columns, scale), (weights, weights))
        values = (row.detach(), column.detach(), *gradients)
        results[name] = dict(zip(PARTS, values, strict=True))
    return results


@cache
def found(size: int) -> list[dict[str, Results]]:
    return run_ranks(on_this_rank, size, UNEVEN[size], {**SETTINGS, **(GROUPED if size == 4 else {})})


def together(size: int, setting: str) -> Results:
    """All ranks' rows in their order; the scale's gradient summed."""
    by_rank = [result[setting] for result in found(size)]
    joined = {name: torch.cat([result[name] for result in by_rank]) for name in PARTS[:4]}
    return {**joined, "d_scale": torch.stack([result["d_scale"] for result in by_rank]).sum(0)}


def expected(size: int, *, bf16: bool = False, group_size: int | None = None) -> Results:
    """By a double loop over all pairs of other samples (of the same group of ranks)."""
    of = problem(N, N, SCALE)
    groups = torch.tensor(
        [rank // (group_size or size) for rank, count in enumerate(UNEVEN[size]) for _ in range(count)]
    )
    counts = ~torch.eye(N, dtype=torch.bool) & (groups[:, None] == groups[None, :])
    scales = torch.full((N,), SCALE, dtype=torch.float64)
    columns = of.columns.bfloat16().double() if bf16 else of.columns
    results, gradients = defined(type(of)(of.rows, columns, scales, scales, counts, counts))
    d_scale = (gradients[2].sum() + gradients[3].sum())[None]
    return dict(zip(PARTS, (*results, *gradients[:2], d_scale), strict=True))


SIZES = pytest.mark.parametrize("size", UNEVEN)


@SIZES
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_uneven_ranks_equal_one_process(size: int, exchange: str) -> None:
    wanted = expected(size)
    for name, tensor in together(size, exchange).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-10, atol=1e-10)


@SIZES
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_bf16_wire_is_the_loss_of_rounded_columns(size: int, exchange: str) -> None:
    """Values to the last bit of float64; what gather sends back is rounded once a rank, what a ring sends back never.

    A ring's own block does not travel, and is rounded all the same: all ranks see the same columns.
    """
    wanted = expected(size, bf16=True)
    for name, tensor in together(size, f"{exchange} in bf16").items():
        rounded = name == "d_columns" and exchange == "gather"
        largest = float(wanted[name].abs().max())
        rtol, atol = (0.0, size * 2**-9 * largest) if rounded else (1e-10, 1e-10)
        torch.testing.assert_close(tensor, wanted[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_group_of_ranks_compares_its_own_pairs_only(exchange: str) -> None:
    wanted = expected(4, group_size=2)
    for name, tensor in together(4, f"{exchange} in groups").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-10, atol=1e-10)


def far_from_all() -> tuple[Tensor, Tensor]:
    """Eleven unit rows and columns in fp32 of which row 3 alone is far from every column: a cosine of about -0.9."""
    generator = torch.Generator().manual_seed(6)
    rows, columns = (0.2 * torch.randn(N, 8, generator=generator) for _ in range(2))
    rows[:, 0] += 1
    columns[:, 0] += 1
    rows[3] = -rows[3]
    return torch.nn.functional.normalize(rows, dim=1), torch.nn.functional.normalize(columns, dim=1)


def far_on_this_rank(counts: tuple[int, ...]) -> Results:
    world = World.current()
    own = RowGroup(None, world.rank, counts).local
    exchange = Exchange(world, SimilarityConfig(exchange="ring"))
    ranks, _ = exchange.count(own.stop - own.start)
    rows, columns = (part[own].clone().requires_grad_() for part in far_from_all())
    row, parts = log_sum_exp(rows, exchange.columns(columns, ranks), torch.tensor([100.0]))
    column = ranks.merge_log_sum_exp(parts)
    values = (row.detach(), column.detach(), *torch.autograd.grad(row.sum() + column.sum(), (rows, columns)))
    return dict(zip(PARTS, values, strict=False))


def test_all_ranks_of_a_ring_go_round_again_where_one_of_them_lost_digits() -> None:
    """At a scale of 100 no exponential of row 3, which one rank alone has, is near the largest possible."""
    rows, columns = (part.double().requires_grad_() for part in far_from_all())
    logits = 100 * rows @ columns.T
    assert logits[3].max() < -25
    wanted = logits.logsumexp(1), logits.logsumexp(0)
    gradients = torch.autograd.grad(wanted[0].sum() + wanted[1].sum(), (rows, columns))
    by_rank = run_ranks(far_on_this_rank, 3, UNEVEN[3])
    for name, tensor in zip(PARTS, (*wanted, *gradients), strict=False):
        found_by_all = torch.cat([result[name] for result in by_rank]).double()
        torch.testing.assert_close(found_by_all, tensor, rtol=1e-4, atol=1e-3)
