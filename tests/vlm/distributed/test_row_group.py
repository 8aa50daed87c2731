"""Collectives over uneven rows: values and gradients of one process that holds all rows, on 2 to 4 ranks."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_ranks
from vlm.distributed.row_group import RowGroup

COUNTS: dict[int, tuple[int, ...]] = {2: (4, 1), 3: (2, 0, 3), 4: (3, 1, 5, 2)}
DIM = 3

Results = dict[str, Tensor]


def own_rows(counts: tuple[int, ...], rank: int) -> Tensor:
    return all_rows(counts)[RowGroup(None, rank, counts).local]


def all_rows(counts: tuple[int, ...]) -> Tensor:
    return torch.randn(sum(counts), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def part(counts: tuple[int, ...], rank: int, *shape: int) -> Tensor:
    """Numbers over all rows that differ from rank to rank; of some rows no rank knows anything, of others only one."""
    generator = torch.Generator().manual_seed(50 + rank)
    numbers = 60 * torch.randn(sum(counts), *shape, dtype=torch.float64, generator=generator)
    if not shape:
        numbers[0] = -torch.inf
        if rank:
            numbers[1] = -torch.inf
    return numbers


def on_this_rank(counts: tuple[int, ...]) -> Results:
    """Everything that a row group does, with the gradient of a sum of this rank's results in weights of its own."""
    rank = dist.get_rank()
    ranks = RowGroup(None, rank, counts)
    results: Results = {}

    def record(name: str, operation: Callable[[Tensor], Tensor], argument: Tensor) -> None:
        leaf = argument.clone().requires_grad_()
        result = operation(leaf)
        results[name] = result.detach()
        (results[f"d_{name}"],) = torch.autograd.grad(result, leaf, weights(result, rank))

    record("gather", ranks.gather, own_rows(counts, rank))
    record("gather_bf16", lambda rows: ranks.gather(rows, torch.bfloat16), own_rows(counts, rank).float())
    record("sum_to_owners", ranks.sum_to_owners, part(counts, rank, DIM))
    record("sum", ranks.sum, part(counts, rank, DIM))
    record("merge", ranks.merge_log_sum_exp, part(counts, rank))
    results["constant"] = ranks.gather_constant(torch.arange(counts[rank]) + 100 * rank)
    results["largest"] = ranks.largest(part(counts, rank))
    return results


def weights(result: Tensor, rank: int) -> Tensor:
    """By which a rank's loss sums a result's elements."""
    return torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view_as(result) * (rank + 1)


@cache
def found(size: int) -> list[Results]:
    return run_ranks(on_this_rank, size, COUNTS[size])


def groups(size: int) -> list[RowGroup]:
    return [RowGroup(None, rank, COUNTS[size]) for rank in range(size)]


SIZES = pytest.mark.parametrize("size", COUNTS)


@SIZES
def test_gather_hands_out_all_rows_and_sums_what_ranks_say_about_each(size: int) -> None:
    rows = all_rows(COUNTS[size])
    said = sum(weights(rows, rank) for rank in range(size))
    for group, result in zip(groups(size), found(size), strict=True):
        assert torch.equal(result["gather"], rows)
        torch.testing.assert_close(result["d_gather"], torch.as_tensor(said)[group.local])


@SIZES
def test_a_bf16_wire_rounds_rows_once_and_each_rank_s_gradient_once(size: int) -> None:
    rows = all_rows(COUNTS[size]).float()
    rounded = [weights(rows, rank).bfloat16().float() for rank in range(size)]
    for group, result in zip(groups(size), found(size), strict=True):
        assert torch.equal(result["gather_bf16"], rows.bfloat16().float())
        torch.testing.assert_close(result["d_gather_bf16"], torch.as_tensor(sum(rounded))[group.local])


@SIZES
def test_sums_go_to_the_owners_of_rows_and_their_gradients_to_all_ranks(size: int) -> None:
    counts = COUNTS[size]
    total = torch.as_tensor(sum(part(counts, rank, DIM) for rank in range(size)))
    said = torch.cat([weights(total[group.local], group.rank) for group in groups(size)])
    for group, result in zip(groups(size), found(size), strict=True):
        torch.testing.assert_close(result["sum_to_owners"], total[group.local])
        torch.testing.assert_close(result["d_sum_to_owners"], said)


@SIZES
def test_a_sum_s_gradient_is_that_of_all_ranks_losses(size: int) -> None:
    total = torch.as_tensor(sum(part(COUNTS[size], rank, DIM) for rank in range(size)))
    said = torch.as_tensor(sum(weights(total, rank) for rank in range(size)))
    for result in found(size):
        torch.testing.assert_close(result["sum"], total)
        torch.testing.assert_close(result["d_sum"], said)


@SIZES
def test_log_sum_exps_merge_with_parts_that_know_nothing(size: int) -> None:
    """-inf and no gradient where no rank knows anything; the one part where one does."""
    counts = COUNTS[size]
    parts = torch.stack([part(counts, rank) for rank in range(size)]).requires_grad_()
    merged = parts[:, 1:].logsumexp(0)
    said = torch.cat([weights(parts[0, group.local], group.rank) for group in groups(size)])
    (gradient,) = torch.autograd.grad(merged, parts, said[1:])
    merged = torch.cat([torch.tensor([-torch.inf]), merged])
    for group, result in zip(groups(size), found(size), strict=True):
        torch.testing.assert_close(result["merge"], merged[group.local])
        torch.testing.assert_close(result["d_merge"], gradient[group.rank])


@SIZES
def test_constants_and_maxima(size: int) -> None:
    counts = COUNTS[size]
    constants = [place + 100 * rank for rank, count in enumerate(counts) for place in range(count)]
    most = torch.stack([part(counts, rank) for rank in range(size)]).amax(0)
    for result in found(size):
        assert result["constant"].tolist() == constants
        assert torch.equal(result["largest"], most)


def test_one_rank_has_it_all() -> None:
    alone = RowGroup(None, 0, (4,))
    rows = torch.randn(4, 2, requires_grad=True)
    for operation in (alone.gather, alone.sum_to_owners, alone.sum):
        assert operation(rows) is rows
    assert torch.equal(alone.merge_log_sum_exp(rows[:, 0]), rows[:, 0])
    assert not alone.gather_constant(rows).requires_grad
    assert not alone.largest(rows).requires_grad
