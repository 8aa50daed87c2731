"""Intervals of shares against published values, and against the equation that they solve."""

import math

import pytest

from eval.intervals import wilson


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_intervals_are_those_of_newcombe(hits: int, trials: int, low: float, high: float) -> None:
    """Newcombe, 1998: Two-sided confidence intervals for the single proportion, table I, method 3."""
    assert wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("hits", "trials"), [(3, 7), (0, 1), (9, 9), (500, 1000)])
def test_at_its_ends_the_share_is_as_far_off_as_chance_allows(hits: int, trials: int) -> None:
    for end in wilson(hits, trials):
        if 0 < end < 1:
            assert abs(hits / trials - end) == pytest.approx(1.95996398454 * math.sqrt(end * (1 - end) / trials))
