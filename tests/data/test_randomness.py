"""Keyed randomness: named, stable, uniform."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.randomness import Draws, Permutation, hash_key


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(), st.text())
def test_a_permutation_visits_everything_once(count: int, seed: int, name: str) -> None:
    seen = Permutation(count, seed, name)(np.arange(count))
    assert sorted(seen.tolist()) == list(range(count))


def test_a_permutation_is_the_same_in_pieces_and_at_any_size() -> None:
    shuffle = Permutation(10**12 + 7, "large")
    positions = np.array([0, 5, 10**12 + 6, 123_456_789_012])
    whole = shuffle(positions)
    assert [int(shuffle(positions[i : i + 1])[0]) for i in range(4)] == whole.tolist()
    assert ((whole >= 0) & (whole < 10**12 + 7)).all()


@pytest.mark.parametrize("size", [3, 4])
def test_every_small_permutation_is_about_equally_likely(size: int) -> None:
    trials = 4000
    counts = Counter(tuple(Permutation(size, key)(np.arange(size)).tolist()) for key in range(trials))
    expected = trials / math.factorial(size)
    chi_square = sum((counts[p] - expected) ** 2 / expected for p in itertools.permutations(range(size)))
    degrees = math.factorial(size) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)  # five standard deviations


def test_a_shuffle_has_no_rank_correlation_and_no_kept_neighbours() -> None:
    count = 20_000
    seen = Permutation(count, "quality")(np.arange(count))
    assert abs(np.corrcoef(np.arange(count), seen)[0, 1]) < 5 / math.sqrt(count)
    # |a - b| of two independent uniform positions has mean count / 3 and standard deviation count / sqrt(18).
    distance = np.abs(np.diff(seen)).mean()
    assert abs(distance - count / 3) < 5 * count / math.sqrt(18 * count)


def test_draws_are_named_by_their_key_alone() -> None:
    first = [Draws("crop", 1, 2, 3).uniform() for _ in range(3)]
    assert first[0] == first[1] == first[2]
    assert len({Draws(*key).uniform() for key in [("crop", 1, 2), ("crop", 12), ("crop", "1", 2), ("cap", 1, 2)]}) == 4
    assert hash_key("a", "b") != hash_key("ab") != hash_key("a\x1fb")


def test_draws_keep_their_values_for_ever() -> None:
    # Frozen when first written: a run resumed under a later version must go on with the same crops.
    draws = Draws("frozen", 0)
    assert [draws.integer(1000) for _ in range(10)] == FROZEN_INTEGERS
    assert Permutation(10, "frozen")(np.arange(10)).tolist() == FROZEN_SHUFFLE


def test_draws_are_uniform() -> None:
    draws = Draws("uniform")
    values = np.array([draws.uniform(2.0, 4.0) for _ in range(20_000)])
    assert values.min() >= 2.0
    assert values.max() < 4.0
    assert abs(values.mean() - 3.0) < 5 * 2 / math.sqrt(12 * 20_000)
    assert np.histogram(values, 10)[0].std() < 5 * math.sqrt(2000)


FROZEN_INTEGERS = [3, 113, 763, 665, 543, 556, 369, 711, 383, 798]
FROZEN_SHUFFLE = [3, 2, 4, 6, 7, 0, 9, 8, 1, 5]
