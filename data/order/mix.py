"""The source of each place of a lane: shares that are exact in every window, and closed form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data.source_names import recipe_key
from vlm.errors import UserError

WINDOW_BATCHES = 1_000
MAX_GLOBAL_BATCH = 2_000_000  # above it, products of two positions in a window leave 64 bits
_GOLDEN = (math.sqrt(5) - 1) / 2

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Mix:
    """The sources of `lanes` lanes of `per_batch` places a batch; `counts[i]` places of a window are of source i.

    One cyclic pattern holds a window of 1,000 global batches: place x of it has the value `multiplier * x mod period`,
    which visits every number below the period once, and source i owns `counts[i]` of these numbers in a row. Lane l
    starts l/lanes of the pattern later than lane 0, so the lanes' next 1,000 batches always make up the whole pattern:
    in any window of 1,000 batches, wherever it starts, source i comes exactly `counts[i]` times. The multiplier spreads
    the values of the lanes in one batch, and of the batches in one lane, as evenly as a lattice can.
    """

    counts: tuple[int, ...]
    lanes: int
    per_batch: int

    @cached_property
    def period(self) -> int:
        """Places in the pattern: 1,000 global batches."""
        return sum(self.counts)

    def sources(self, lanes: Positions, places: Positions) -> Positions:
        """The source of the n-th place of each lane."""
        values = self._start(lanes) + places
        values = values % self.period * self._multiplier % self.period
        return np.searchsorted(self._ends, values, side="right")

    def numbers(self, sources: Positions, lanes: Positions, places: Positions) -> Positions:
        """The number of times that the source came in the lane before this place."""
        if len(self.counts) == 1:
            return places
        start = self._start(lanes)
        return self._before(sources, start + places) - self._before(sources, start)

    def most_in_a_batch(self, source: int) -> int:
        """The most places of one source that any global batch has."""
        if len(self.counts) == 1:
            return self.lanes * self.per_batch
        # Lane l starts 1,000 batches behind lane l - 1, so batches of all lanes are columns of the pattern's batches.
        ends = np.arange(WINDOW_BATCHES * self.lanes + 1, dtype=np.int64) * self.per_batch
        before = self._before(np.full_like(ends, source), ends)
        return int(np.diff(before).reshape(self.lanes, WINDOW_BATCHES).sum(0).max())

    def _start(self, lanes: Positions) -> Positions:
        return lanes * (self.period // self.lanes)

    def _before(self, sources: Positions, ends: Positions) -> Positions:
        """The number of places of the source among the first `ends` of the endlessly repeated pattern."""
        cycles, rest = np.divmod(ends, self.period)
        highs = self._ends[sources]
        counts = np.asarray(self.counts, dtype=np.int64)[sources]
        return cycles * counts + self._below(highs, rest) - self._below(highs - counts, rest)

    def _below(self, limits: Positions, ends: Positions) -> Positions:
        """The number of the first `ends` places whose value is below the limit.

        The sum over x of floor(a x / P) - floor((a x - limit) / P) counts them.
        """
        total = floor_sum(ends, self.period, self._multiplier, np.zeros_like(ends))
        return total - floor_sum(ends, self.period, self._multiplier, self.period - limits) + ends

    @cached_property
    def _ends(self) -> Positions:
        return np.cumsum(self.counts, dtype=np.int64)

    @cached_property
    def _multiplier(self) -> int:
        """Near the golden ratio of the lanes plus that of a lane's stride: neither axis resonates with the shares."""
        stride = self.period // self.lanes
        near = (stride * round(self.lanes * _GOLDEN) + round(stride * _GOLDEN)) % self.period
        return next(near + step for step in range(self.period) if math.gcd(near + step, self.period) == 1)


def make_mix(weights: Mapping[str, float], global_batch: int, lanes: int) -> Mix:
    """The mix in which each source has its share of the `weights`, rounded to one sample in 1,000 batches.

    Raises:
        UserError: a weight is too small to come even once in 1,000 batches, or the global batch is too large.
    """
    if global_batch > MAX_GLOBAL_BATCH:
        raise UserError(f"global_batch: {global_batch:,} is more than {MAX_GLOBAL_BATCH:,}")
    counts = apportion([Fraction(repr(weight)) for weight in weights.values()], WINDOW_BATCHES * global_batch)
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if count == 0:
            raise UserError(
                f"{recipe_key(name)}: its weight {weight:g} is less than one sample in {WINDOW_BATCHES:,} batches"
            )
    return Mix(tuple(counts), lanes, global_batch // lanes)


def apportion(weights: Sequence[Fraction], seats: int) -> list[int]:
    """Whole numbers that sum to `seats`, each less than one from its share (largest remainders, first come first)."""
    total = sum(weights)
    exact = [weight * seats / total for weight in weights]
    counts = [math.floor(number) for number in exact]
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: seats - sum(counts)]:
        counts[i] += 1
    return counts


def floor_sum(counts: Positions, modulus: int, slope: int, offsets: Positions) -> Positions:
    """The sum of floor((slope x + offset) / modulus) over x below each count, by Euclid's algorithm on all at once."""
    counts, offsets = counts.copy(), offsets.copy()
    total = np.zeros_like(counts)
    while counts.any():
        total += counts * (counts - 1) // 2 * (slope // modulus) + counts * (offsets // modulus)
        slope %= modulus
        last = slope * counts + offsets % modulus
        counts, offsets = np.divmod(last, modulus)
        modulus, slope = slope, modulus
        if modulus == 0:
            break
    return total
