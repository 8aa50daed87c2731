"""Near pairs of hashes are those that comparing all with all finds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.check.near import HashIndex, group_near

DISTANCES = st.integers(0, 6)


def scattered(seed: int, count: int, flips: int) -> np.ndarray:
    """Hashes in clouds around a few centres: up to `flips` bits away from theirs."""
    draws = np.random.default_rng(seed)
    hashes = draws.integers(0, 2**64, max(1, count // 3), dtype=np.uint64)[draws.integers(0, max(1, count // 3), count)]
    for row in range(count):
        for bit in draws.integers(0, 64, draws.integers(0, flips + 1)):
            hashes[row] ^= np.uint64(1) << np.uint64(bit)
    return hashes


def chains(hashes: np.ndarray, distance: int) -> list[int]:
    """Groups by joining every pair that is near, one after the other."""
    group = list(range(len(hashes)))
    for a, one in enumerate(hashes.tolist()):
        for b, other in enumerate(hashes.tolist()[:a]):
            if (one ^ other).bit_count() <= distance:
                low, high = sorted((group[a], group[b]))
                group = [low if label == high else label for label in group]
    return group


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), DISTANCES)
def test_groups_are_the_chains_of_near_pairs(seed: int, count: int, distance: int) -> None:
    hashes = scattered(seed, count, 4)
    assert group_near(hashes, distance).tolist() == chains(hashes, distance)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 80), DISTANCES)
def test_the_nearest_reference_is_found_if_any_is_near(seed: int, count: int, distance: int) -> None:
    hashes = scattered(seed, count, 5)
    rows, reference = hashes[: count // 2], hashes[count // 2 :]
    expected = []
    for row, one in enumerate(rows.tolist()):
        bits = [(one ^ other).bit_count() for other in reference.tolist()]
        if bits and min(bits) <= distance:
            expected.append((row, bits.index(min(bits)), min(bits)))
    found = HashIndex(reference, distance).nearest(rows)
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected


def test_many_hashes_use_longer_keys_and_find_the_same() -> None:
    draws = np.random.default_rng(0)
    hashes = draws.integers(0, 2**64, 200_000, dtype=np.uint64)
    hashes[100_000:100_500] = hashes[:500] ^ np.uint64(0b1001 << 20) ^ np.uint64(0b11 << 60)
    hashes[100_500:101_000] = hashes[500:1000] ^ np.uint64(0b10101 << 20) ^ np.uint64(0b11 << 60)
    groups = group_near(hashes, 4)
    assert groups[100_000:100_500].tolist() == list(range(500))
    assert groups[100_500:].tolist() == list(range(100_500, 200_000))  # five bits away
