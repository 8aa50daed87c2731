"""One source in batches of neighbours: of one cluster each, or of whole groups, in closed form."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.order.line import Positions, StoredRows, stable_argsort
from data.randomness import key_number, permute, scramble

NO_LABEL = -1
_MOST_SMALL = 2**31

Labels = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The labels of all samples of a source, numbered through its shards: the cluster, or the group, of each.

    Groups have `group_size` members, smaller ones are left out; `clusters` are then the cluster of each sample.
    """

    labels: Labels
    group_size: int | None = None
    clusters: Labels | None = None


class _Members(NamedTuple):
    """Samples sorted by cluster (and then by group): the places where clusters end, and which cluster each is of."""

    samples: NDArray[Any]
    ends: Positions
    cluster_of: Labels


class NeighbourLine:
    """The order of one source in batches of neighbours: a function of seed, name, counts, labels and `batch` alone.

    Global batch b of the run takes up to `batch` samples, those of block b mod blocks of epoch b div blocks. By
    cluster, an epoch's blocks are those of each cluster's own keyed shuffle, so many as it fills, all of them in a
    keyed order; by group, its groups are shuffled and cut into blocks. So each sample comes at most once an epoch, and
    what is left of a cluster after its last block comes in another epoch. A batch that takes fewer, as in a mix, takes
    the first of its block, and its last group may be cut. Memory: two numbers of 32 bits a sample.
    """

    def __init__(self, seed: int, name: str, counts: Positions, neighbours: Neighbours, batch: int) -> None:
        self.name = name
        self.counts = np.asarray(counts, dtype=np.int64)
        self.batch = batch
        self._key = ("neighbours", seed, name)
        self._ends = np.cumsum(self.counts)
        self.group_size = neighbours.group_size
        self._members = _sorted(neighbours) if self.group_size is None else _sorted_groups(neighbours, self.group_size)
        sizes = np.diff(self._members.ends, prepend=0)
        if self.group_size is None:
            self._block_ends = np.cumsum(sizes // batch)
            self.num_blocks = int(self._block_ends[-1]) if len(sizes) else 0
            self.largest = int(sizes.max(initial=0))
            self.num_reached = int(sizes[sizes >= batch].sum())
        else:
            self._num_groups = len(self._members.samples) // self.group_size
            self._groups_a_block = -(-batch // self.group_size)
            self.num_blocks = self._num_groups // self._groups_a_block
            self.largest = len(self._members.samples)
            self.num_reached = self.largest if self.num_blocks else 0

    @property
    def num_samples(self) -> int:
        """Samples that have a label, and a group that is full where groups are asked for."""
        return len(self._members.samples)

    def find(self, number: int, places: Positions) -> StoredRows:
        """The samples at these places, below `batch`, of global batch `number`."""
        epoch, block = divmod(number, self.num_blocks)
        epochs = np.full(places.shape, epoch, dtype=np.int64)
        find = self._of_cluster if self.group_size is None else self._of_groups
        return self._stored(epochs, find(epoch, block, places))

    def block(self, place: StoredRows) -> tuple[int, int]:
        """The part (first position, number of samples) of the sorted samples that is of one sample's cluster."""
        sample = int(self._ends[place.shards[0]] - self.counts[place.shards[0]] + place.rows[0])
        cluster = int(self._members.cluster_of[sample])
        start = int(self._members.ends[cluster - 1]) if cluster else 0
        return start, int(self._members.ends[cluster]) - start

    def at(self, epoch: int, positions: Positions) -> StoredRows:
        """The samples at these positions of all that have a label, sorted by cluster."""
        return self._stored(np.full(positions.shape, epoch, dtype=np.int64), positions)

    def _of_cluster(self, epoch: int, block: int, places: Positions) -> Positions:
        shuffled = int(_permuted(np.array([block]), self.num_blocks, key_number(*self._key, epoch))[0])
        cluster = int(np.searchsorted(self._block_ends, shuffled, side="right"))
        start, end = (int(self._members.ends[cluster - 1]) if cluster else 0), int(self._members.ends[cluster])
        before = int(self._block_ends[cluster - 1]) if cluster else 0
        key = key_number(*self._key, epoch, cluster)
        return start + _permuted((shuffled - before) * self.batch + places, end - start, key)

    def _of_groups(self, epoch: int, block: int, places: Positions) -> Positions:
        assert self.group_size is not None
        key = key_number(*self._key, epoch)
        number, member = np.divmod(places, self.group_size)
        groups = _permuted(block * self._groups_a_block + number, self._num_groups, key)
        keys = scramble(groups.astype(np.uint64) ^ scramble(np.full(groups.shape, key), 1))
        return groups * self.group_size + permute(member, np.full(groups.shape, self.group_size), keys)

    def _stored(self, epochs: Positions, positions: Positions) -> StoredRows:
        samples = self._members.samples[positions].astype(np.int64)
        shards = np.searchsorted(self._ends, samples, side="right")
        return StoredRows(epochs, shards, samples - (self._ends - self.counts)[shards])


def _permuted(positions: Positions, count: int, key: np.uint64) -> Positions:
    return permute(positions, np.full(positions.shape, count), np.full(positions.shape, key))


def _sorted(neighbours: Neighbours) -> _Members:
    """The samples that have a label, by cluster."""
    used = np.flatnonzero(neighbours.labels != NO_LABEL)
    return _by_cluster(used, neighbours.labels[used], len(neighbours.labels))


def _sorted_groups(neighbours: Neighbours, size: int) -> _Members:
    """The samples of full groups, group by group, the groups of one cluster (that of their first member) together."""
    assert neighbours.clusters is not None
    used = np.flatnonzero(neighbours.labels != NO_LABEL)
    groups = neighbours.labels[used]
    used = used[np.bincount(groups)[groups] == size] if len(used) else used
    used = used[stable_argsort(neighbours.labels[used].view(np.uint32))]
    clusters = np.repeat(neighbours.clusters[used[::size]], size)
    return _by_cluster(used, clusters, len(neighbours.labels))


def _by_cluster(used: Positions, clusters: Labels, num_samples: int) -> _Members:
    kind = np.int32 if num_samples < _MOST_SMALL else np.int64
    order = stable_argsort(clusters.view(np.uint32))  # no label is below 0
    samples, is_last = used[order].astype(kind), np.ones(len(used), bool)
    is_last[:-1] = np.diff(clusters[order]) != 0
    ends = np.flatnonzero(is_last) + 1
    cluster_of = np.full(num_samples, NO_LABEL, np.int32)
    cluster_of[samples] = np.repeat(np.arange(len(ends), dtype=np.int32), np.diff(ends, prepend=0))
    return _Members(samples, ends, cluster_of)
