"""Which sample comes when: pure functions of seed, counts, weights and position, with no I/O and no state."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.randomness import Permutation
from vlm.errors import UserError

MAX_PERIOD = 1_000_000


@dataclass(frozen=True)
class Line:
    """One source as the order sees it: its name (which keys its shuffles), its samples and its share."""

    name: str
    num_samples: int
    weight: float = 1.0


class Picks(NamedTuple):
    """For some slots of a global batch: the source, that source's epoch, and the sample's number within the source."""

    sources: NDArray[np.int64]
    epochs: NDArray[np.int64]
    samples: NDArray[np.int64]


class Order:
    """The endless sequence of samples behind the global batches.

    Slots follow one periodic pattern of sources whose shares are exact to less than one sample over any prefix; each
    source runs through its own line of epochs, every epoch a full shuffle keyed by (seed, source, epoch). So a global
    batch is a function of its number: it knows no ranks, no workers and no restarts.
    """

    def __init__(self, seed: int, lines: Sequence[Line]) -> None:
        self._seed = seed
        self._lines = tuple(lines)
        shares = whole_shares({line.name: line.weight for line in lines})
        self._pattern = periodic_pattern(shares)
        self._share = np.asarray(shares, dtype=np.int64)
        # _rank[k]: how often the source of slot k came before, within one period.
        self._rank = np.zeros(len(self._pattern), dtype=np.int64)
        for source in range(len(lines)):
            places = self._pattern == source
            self._rank[places] = np.arange(places.sum())

    def picks(self, step: int, global_batch: int, rows: range) -> Picks:
        """The samples of slots `rows` of global batch number `step`."""
        positions = step * global_batch + np.arange(rows.start, rows.stop, dtype=np.int64)
        periods, slots = np.divmod(positions, len(self._pattern))
        sources = self._pattern[slots]
        numbers = periods * self._share[sources] + self._rank[slots]
        epochs = np.zeros_like(numbers)
        samples = np.zeros_like(numbers)
        for source, line in enumerate(self._lines):
            mine = np.flatnonzero(sources == source)
            epochs[mine], within = np.divmod(numbers[mine], line.num_samples)
            samples[mine] = self._shuffled(line, epochs[mine], within)
        return Picks(sources, epochs, samples)

    def _shuffled(self, line: Line, epochs: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.int64]:
        samples = np.empty_like(within)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            samples[now] = Permutation(line.num_samples, "epoch", self._seed, line.name, int(epoch))(within[now])
        return samples


def whole_shares(weights: dict[str, float]) -> list[int]:
    """The smallest whole numbers in exactly the ratio of the (decimal) `weights`.

    Raises:
        UserError: the ratio needs a pattern longer than `MAX_PERIOD` slots.
    """
    exact = [Fraction(repr(weight)) for weight in weights.values()]
    denominator = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * denominator) for share in exact]
    common = math.gcd(*whole)
    shares = [share // common for share in whole]
    if sum(shares) > MAX_PERIOD:
        shown = ", ".join(f"{name} {weight}" for name, weight in weights.items())
        raise UserError(
            f"data.sources: the weights ({shown}) repeat only after {sum(shares):,} samples; use fewer digits"
        )
    return shares


def periodic_pattern(shares: Sequence[int]) -> NDArray[np.int64]:
    """One period of slots, `shares[i]` of them for source i, each prefix of n holding n * share to less than one slot.

    The j-th slot of a source may come from floor(j P / share) on and must come by ceil((j + 1) P / share) - 1, with P
    the period; earliest deadline first always meets these windows (Baruah et al., "Proportionate Progress", 1996).
    """
    period = sum(shares)
    done = [0] * len(shares)
    pattern = np.empty(period, dtype=np.int64)
    for slot in range(period):
        ready = [i for i, share in enumerate(shares) if done[i] < share and done[i] * period // share <= slot]
        chosen = min(ready, key=lambda i: -(-(done[i] + 1) * period // shares[i]))
        pattern[slot] = chosen
        done[chosen] += 1
    return pattern
