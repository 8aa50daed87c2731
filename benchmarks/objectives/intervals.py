"""Retrieval figures from ranks, and the interval of a difference between two objectives over the choice of test images.

Ranks are [seeds, images, queries]: 1 is best. An image is one query, its captions are five.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
LEVEL = 0.95

Ranks = NDArray[np.int64]


class Interval(NamedTuple):
    """A difference, and its interval."""

    value: float
    low: float
    high: float

    @property
    def beyond_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def recall(ranks: Ranks, most: int) -> float:
    """The share of queries whose match is among the first `most`, mean over seeds."""
    return float((ranks <= most).mean())


def median_rank(ranks: Ranks) -> float:
    """The median over queries, mean over seeds."""
    return float(np.median(ranks.reshape(len(ranks), -1), axis=1).mean())


def recall_difference(ranks: Ranks, base: Ranks, most: int) -> Interval:
    """`recall` minus that of `base`, with its paired bootstrap interval: both see the same resampled images."""
    gain = (ranks <= most).mean(axis=(0, 2)) - (base <= most).mean(axis=(0, 2))
    return interval(float(gain.mean()), gain[_resampled(len(gain))].mean(axis=1))


def median_difference(ranks: Ranks, base: Ranks) -> Interval:
    """`median_rank` minus that of `base`, with its paired bootstrap interval: both see the same resampled images."""
    images = _resampled(ranks.shape[1])
    return interval(median_rank(ranks) - median_rank(base), _medians(ranks, images) - _medians(base, images))


def _resampled(num_images: int) -> NDArray[np.int64]:
    """Image numbers [resamples, images], the same at every call, so that all comparisons are paired."""
    return np.random.default_rng(0).integers(num_images, size=(RESAMPLES, num_images))


def _medians(ranks: Ranks, images: NDArray[np.int64]) -> NDArray[np.float64]:
    """The median rank in each resample, mean over seeds."""
    medians = [np.median(held[images].reshape(len(images), -1), axis=1) for held in ranks]
    mean: NDArray[np.float64] = np.mean(medians, axis=0)
    return mean


def interval(value: float, resampled: NDArray[np.float64]) -> Interval:
    """A value with the interval of its resamples."""
    edge = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [edge, 1 - edge])
    return Interval(value, float(low), float(high))
