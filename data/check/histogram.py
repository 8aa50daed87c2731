"""Distributions of whole numbers, exact, in memory that grows with the distinct values only."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Distribution:
    """A distribution in figures; `quantiles` are the least values that at least that share does not exceed."""

    count: int
    total: float
    min: float | None
    mean: float | None
    max: float | None
    quantiles: dict[str, float]


class Histogram:
    """The count of each whole number."""

    def __init__(self, values: Iterable[int] = ()) -> None:
        distinct, counts = np.unique(np.fromiter(values, dtype=np.int64), return_counts=True)
        self._counts = dict(zip(distinct.tolist(), counts.tolist(), strict=True))

    def add(self, other: "Histogram") -> None:
        """Count what `other` counted as well."""
        for value, count in other._counts.items():
            self._counts[value] = self._counts.get(value, 0) + count

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The values in ascending order, and how often each occurred."""
        values = np.array(sorted(self._counts), dtype=np.int64)
        return values, np.array([self._counts[value] for value in values.tolist()], dtype=np.int64)

    def describe(self, unit: int = 1) -> Distribution:
        """The distribution of the values divided by `unit` (1000: values are thousandths)."""
        values, counts = self.arrays()
        if not len(values):
            return Distribution(0, 0.0, None, None, None, {})
        ends = np.cumsum(counts)
        total = sum(value * count for value, count in self._counts.items())
        places = np.searchsorted(ends, [q * ends[-1] for q in QUANTILES], side="left")
        return Distribution(
            count=int(ends[-1]),
            total=total / unit,
            min=int(values[0]) / unit,
            mean=total / int(ends[-1]) / unit,
            max=int(values[-1]) / unit,
            quantiles={f"{q:g}": int(values[place]) / unit for q, place in zip(QUANTILES, places, strict=True)},
        )
