"""The nearest of many vectors for each of them, without the matrix of all similarities."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.neighbours.kmeans import fit_centres, nearest_centres

_A_LIST = 4096
_PROBES = 8
_ROWS = 1024

Vectors = NDArray[np.float32]


class Nearest(NamedTuple):
    """For each vector the numbers of its nearest others, nearest first, and their cosines; -1 where there are none."""

    numbers: NDArray[np.int64]
    cosines: NDArray[np.float32]


def nearest_others(vectors: Vectors, how_many: int, *, seed: int = 0, a_list: int = _A_LIST) -> Nearest:
    """The nearest other unit vectors of each unit vector.

    Vectors are sorted into lists of about `a_list` by k-means, and compared with those of the `_PROBES` lists whose
    centres are nearest to their own: exact up to `_PROBES` lists, and beyond it linear in the number of vectors.
    """
    lists = max(1, len(vectors) // a_list)
    found = Nearest(np.full((len(vectors), how_many), -1, np.int64), np.full((len(vectors), how_many), -1, np.float32))
    if not len(vectors):
        return found
    centres = fit_centres(vectors, lists, seed)
    of_list = nearest_centres(vectors, centres)
    by_list = [np.flatnonzero(of_list == number) for number in range(lists)]
    for number, members in enumerate(by_list):
        apart = np.einsum("kd,kd->k", centres - centres[number], centres - centres[number])
        probed = np.argsort(apart, kind="stable")[:_PROBES]
        pool = np.sort(np.concatenate([by_list[probe] for probe in probed]))
        for start in range(0, len(members), _ROWS):
            rows = members[start : start + _ROWS]
            numbers, cosines = _nearest_of(vectors, rows, pool, how_many)
            found.numbers[rows, : numbers.shape[1]], found.cosines[rows, : cosines.shape[1]] = numbers, cosines
    return found


def _nearest_of(vectors: Vectors, rows: NDArray[np.int64], pool: NDArray[np.int64], how_many: int) -> Nearest:
    cosines = vectors[rows] @ vectors[pool].T
    cosines[np.arange(len(rows)), np.searchsorted(pool, rows)] = -np.inf
    count = min(how_many, len(pool))
    best = np.sort(np.argpartition(-cosines, count - 1, axis=1)[:, :count], axis=1)
    near = np.take_along_axis(cosines, best, axis=1)
    order = np.argsort(-near, axis=1, kind="stable")
    near, best = np.take_along_axis(near, order, axis=1), np.take_along_axis(best, order, axis=1)
    is_other = np.isfinite(near)
    return Nearest(np.where(is_other, pool[best], -1), np.where(is_other, near, -1).astype(np.float32))
