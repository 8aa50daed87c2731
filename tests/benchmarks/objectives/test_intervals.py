"""The figures and intervals of the comparison of objectives, against hand-counted ranks and closed forms."""

import math

import numpy as np
import pytest

from benchmarks.objectives.intervals import median_difference, median_rank, recall, recall_difference


def test_figures_are_those_counted_by_hand_and_averaged_over_seeds() -> None:
    ranks = np.array([[[1], [7], [20]], [[2], [3], [11]]])
    assert recall(ranks, 5) == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert median_rank(ranks) == 5.0  # of 7 and 3


def test_the_interval_of_a_share_is_that_of_the_normal_approximation() -> None:
    """Against a base that never hits, the difference is a plain share of 1,000 independent images."""
    hits = np.arange(1000) < 300
    interval = recall_difference(np.where(hits, 1, 50)[None, :, None], np.full((1, 1000, 1), 50), 10)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert interval.value == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.004)
    assert interval.high == pytest.approx(0.3 + half, abs=0.004)
    assert interval.beyond_zero


def test_pairing_leaves_no_width_where_every_image_differs_alike() -> None:
    """Two objectives that hit the same images differ by nothing in every resample; a shift of all ranks is exact."""
    ranks = np.random.default_rng(3).integers(1, 1000, size=(2, 400, 5))
    assert recall_difference(ranks, ranks, 10) == (0.0, 0.0, 0.0)
    assert median_difference(ranks + 4, ranks) == (4.0, 4.0, 4.0)


def test_captions_of_an_image_are_resampled_together() -> None:
    """Five equal captions an image are no more evidence than one."""
    random = np.random.default_rng(5)
    ranks, base = random.integers(1, 30, size=(2, 1, 300, 1))
    one = recall_difference(ranks, base, 10)
    five = recall_difference(ranks.repeat(5, axis=2), base.repeat(5, axis=2), 10)
    assert five == pytest.approx(one)
