"""Groups of mutual neighbours, greedy and block by block, so that memory grows with the number of samples alone."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

NO_GROUP = -1
_BLOCK = 2048
_ROUNDS = 8  # of the power iteration: the cut need not be exact

Places = NDArray[np.int64]


def group_neighbours(vectors: NDArray[np.float32], size: int, block: int = _BLOCK) -> Places:
    """The group of each unit vector [samples, dim]: floor(samples / size) groups of `size`; the rest have none.

    What is larger than a block is cut in two across its first principal direction, where the gap is widest in its
    middle third, again and again. In a block the sample in the densest place begins a group, and the one that is
    nearest to all of the group comes in, until it is full. A block costs its square, so all cost samples times block.
    """
    groups = np.full(len(vectors), NO_GROUP, np.int64)
    done = 0
    for places in _blocks(vectors, np.arange(len(vectors)), size, max(block, 2 * size)):
        for members in _greedy(vectors[places], size):
            groups[places[members]] = done
            done += 1
    return groups


def _blocks(vectors: NDArray[np.float32], places: Places, size: int, most: int) -> Iterator[Places]:
    """The places in blocks of whole groups, but for the last one; near samples mostly in one block."""
    if len(places) <= most:
        yield places
        return
    along = _along_first(vectors[places])
    ranks = np.argsort(along, kind="stable")
    cuts = np.arange(-(-len(places) // 3 // size) * size, 2 * len(places) // 3 + 1, size)
    cut = int(cuts[np.argmax(along[ranks[cuts]] - along[ranks[cuts - 1]])])
    yield from _blocks(vectors, np.sort(places[ranks[:cut]]), size, most)
    yield from _blocks(vectors, np.sort(places[ranks[cut:]]), size, most)


def _along_first(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The coordinates along the first principal direction, by power iteration from the vector furthest out."""
    centred = vectors - vectors.mean(0)
    direction = centred[np.argmax(np.einsum("nd,nd->n", centred, centred))]
    for _ in range(_ROUNDS):
        direction = centred.T @ (centred @ direction)
        direction = direction / max(float(np.linalg.norm(direction)), np.finfo(np.float32).tiny)
    along: NDArray[np.float32] = centred @ direction
    return along


def _greedy(vectors: NDArray[np.float32], size: int) -> Iterator[Places]:
    """Whole groups within one block, as places in it."""
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.partition(similarity, -(size - 1), axis=1)[:, -(size - 1) :] if len(vectors) >= size else similarity
    by_density = np.argsort(-nearest.sum(1), kind="stable")
    is_free = np.ones(len(vectors), bool)
    left = len(vectors)
    for first in by_density.tolist():
        if left < size:
            return
        if not is_free[first]:
            continue
        members, to_group = [first], similarity[first].copy()
        is_free[first] = False
        while len(members) < size:
            nearest_one = int(np.argmax(np.where(is_free, to_group, -np.inf)))
            members.append(nearest_one)
            is_free[nearest_one] = False
            to_group += similarity[nearest_one]
        left -= size
        yield np.asarray(members, np.int64)
