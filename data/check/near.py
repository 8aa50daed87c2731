"""Near pairs among 64-bit hashes, without comparing all with all.

Two hashes that differ in at most d bits agree wholly in some b - d of b bands of bits; so each near pair meets under
one of the sort keys that b - d bands make (Manku et al., 2007). b grows with the number of hashes, to keep the runs of
equal keys short.
"""

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]

_BITS = 64
_MOST_EXTRA_BANDS = 4


class Matches(NamedTuple):
    """Rows that have a near hash in a reference: the row, the nearest reference, and their distance in bits."""

    rows: Indices
    references: Indices
    distances: NDArray[np.uint8]


class HashIndex:
    """Index for the nearest of `reference` within `distance` bits (of equally near ones the first)."""

    def __init__(self, reference: Hashes, distance: int) -> None:
        self._hashes, self._first = np.unique(reference, return_index=True)
        self._distance = distance
        self._tables = []
        for mask in _masks(distance, len(self._hashes)):
            order = np.argsort(self._hashes & mask, kind="stable")
            self._tables.append((mask, order, (self._hashes & mask)[order]))

    def nearest(self, hashes: Hashes) -> Matches:
        """The matches of `hashes`, by row."""
        best = np.full(len(hashes), _BITS + 1, dtype=np.uint8)
        nearest = np.full(len(hashes), len(self._first), dtype=np.int64)
        for mask, order, keys in self._tables:
            place = np.searchsorted(keys, hashes & mask, side="left")
            end = np.searchsorted(keys, hashes & mask, side="right")
            rows = np.flatnonzero(place < end)
            while len(rows):
                candidate = order[place[rows]]
                bits = np.bitwise_count(hashes[rows] ^ self._hashes[candidate])
                first = self._first[candidate]
                known = np.where(best[rows] <= _BITS, nearest[rows], np.iinfo(np.int64).max)
                better = (bits <= self._distance) & ((bits < best[rows]) | ((bits == best[rows]) & (first < known)))
                best[rows[better]], nearest[rows[better]] = bits[better], first[better]
                place[rows] += 1
                rows = rows[place[rows] < end[rows]]
        rows = np.flatnonzero(best <= _BITS)
        return Matches(rows, nearest[rows], best[rows])


def group_near(hashes: Hashes, distance: int) -> Indices:
    """For each hash the first row of its group; groups are chains of hashes at most `distance` bits from the next."""
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    # Numbered by first appearance, so that the least number of a group is its first row.
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    labels = np.arange(len(order))
    pairs = list(_near_pairs(distinct[order], distance)) if distance else []
    if pairs:
        _join(labels, np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))
    return first[order][labels][rank[inverse]].astype(np.int64)


def _near_pairs(hashes: Hashes, distance: int) -> Iterator[tuple[Indices, Indices]]:
    """All pairs of rows within `distance` bits; some more than once."""
    for mask in _masks(distance, len(hashes)):
        order = np.argsort(hashes & mask, kind="stable")
        keys = (hashes & mask)[order]
        rows, step = np.arange(len(keys)), 0
        while len(rows):
            step += 1
            rows = rows[rows + step < len(keys)]
            rows = rows[keys[rows] == keys[rows + step]]
            left, right = order[rows], order[rows + step]
            close = np.bitwise_count(hashes[left] ^ hashes[right]) <= distance
            if close.any():
                yield left[close], right[close]


def _join(labels: Indices, left: Indices, right: Indices) -> None:
    """Give the rows that the pairs connect their least number, in place."""
    while True:
        low = np.minimum(labels[left], labels[right])
        if np.array_equal(low, labels[left]) and np.array_equal(low, labels[right]):
            return
        for side in (left, right):
            np.minimum.at(labels, labels[side], low)
            np.minimum.at(labels, side, low)
        while not np.array_equal(labels[labels], labels):
            labels[:] = labels[labels]


def _masks(distance: int, count: int) -> list[np.uint64]:
    """Sort keys: bits chosen such that any pair within `distance` agrees on the bits of at least one."""
    most = distance + _MOST_EXTRA_BANDS
    wanted = min(np.log2(max(count, 2)), _BITS * (most - distance) / most)
    bands = next(b for b in range(distance + 1, most + 1) if _BITS * (b - distance) / b >= wanted)
    edges = [_BITS * band // bands for band in range(bands + 1)]
    masks = [sum(1 << bit for bit in range(low, high)) for low, high in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(masks, bands - distance)]
