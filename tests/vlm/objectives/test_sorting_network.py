"""The differentiable sorting network: doubly stochastic, monotone, and a permutation in the limit."""

import itertools
import math

import pytest
import torch

from vlm.objectives.terms.sorting_network import soft_sort


@pytest.mark.parametrize("size", [1, 2, 3, 6, 11])
def test_masses_of_each_value_and_of_each_rank_sum_to_one(size: int) -> None:
    values = torch.randn(7, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, masses = soft_sort(values, 2.0)
    assert masses.min() >= 0
    for dim in (1, 2):
        torch.testing.assert_close(masses.sum(dim), torch.ones(7, size, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_order_is_sorted_when_comparisons_are_steep(size: int) -> None:
    """The network is long enough for any order: all permutations come out ascending, each mass on its own rank."""
    values = torch.tensor(list(itertools.permutations(range(size))), dtype=torch.float64)
    ascending, masses = soft_sort(values, 1e9)
    expected = torch.arange(size, dtype=torch.float64).expand_as(values)
    torch.testing.assert_close(ascending, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(masses.argmax(2).double(), values, rtol=0, atol=0)


def test_two_values_are_swapped_by_the_cauchy_distribution_of_their_difference() -> None:
    ascending, masses = soft_sort(torch.tensor([[0.2, 0.7]], dtype=torch.float64), 3.0)
    stays = 0.5 + math.atan(3.0 * 0.5) / math.pi
    torch.testing.assert_close(masses[0], torch.tensor([[stays, 1 - stays], [1 - stays, stays]], dtype=torch.float64))
    assert ascending[0, 0].item() == pytest.approx(stays * 0.2 + (1 - stays) * 0.7, abs=1e-14)


def test_gradients_of_values_are_those_of_differences() -> None:
    values = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: soft_sort(v, 1.5)[1], values)
