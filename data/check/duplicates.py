"""Samples that are there more than once: the same picture, the same file, the same key; here or in another set."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.check.near import HashIndex, group_near
from data.check.picture import NO_HASH
from data.check.samples import OpenShard
from data.check.scan import ShardScan


@dataclass(frozen=True)
class SampleName:
    """A sample by its shard and key."""

    shard: str
    key: str


@dataclass(frozen=True)
class DuplicateGroups:
    """Samples that are alike: in `groups` groups of two or more, `samples` together; the first groups by name.

    Of documents it is their pictures that are counted.
    """

    groups: int
    samples: int
    listed: tuple[tuple[SampleName, ...], ...]


Names = Callable[[Iterable[int]], dict[int, SampleName]]


@dataclass(frozen=True)
class Match:
    """A sample, the picture of the other set that it shows, and how many bits their hashes differ in."""

    sample: SampleName
    other: SampleName
    distance_bits: int


@dataclass(frozen=True)
class Overlap:
    """The number of samples that show a picture of the other set, and the first of them by name."""

    samples: int
    listed: tuple[Match, ...]


@dataclass(frozen=True)
class Duplicates:
    """Within the set: equal files, equal or near picture hashes, equal keys; and the overlap with another set.

    `unhashed` pictures (broken, or too plain to tell apart) are in no picture group.
    """

    files: DuplicateGroups
    equal_pictures: DuplicateGroups
    near_pictures: DuplicateGroups
    distance_bits: int
    unhashed: int
    keys: DuplicateGroups
    against: Overlap | None


class Locator:
    """Lookup of samples' names by position in the whole set; only shards that hold a named sample are listed again."""

    def __init__(self, scans: Sequence[ShardScan]) -> None:
        self._shards = [scan.shard for scan in scans]
        self._ends = np.cumsum([scan.num_samples for scan in scans])
        starts = self._ends - [scan.num_samples for scan in scans]
        by_shard = [start + scan.picture_samples for start, scan in zip(starts, scans, strict=True)]
        self._of_pictures = np.concatenate([np.zeros(0, dtype=np.int64), *by_shard])

    def of_pictures(self, positions: Iterable[int]) -> dict[int, SampleName]:
        """The shard and key of the samples of these pictures, by the pictures' positions in the whole set."""
        samples = {position: int(self._of_pictures[position]) for position in positions}
        names = self.names(samples.values())
        return {position: names[sample] for position, sample in samples.items()}

    def names(self, positions: Iterable[int]) -> dict[int, SampleName]:
        """The shard and key of each of these samples."""
        by_shard: dict[int, list[int]] = {}
        for position in sorted(set(positions)):
            by_shard.setdefault(int(np.searchsorted(self._ends, position, side="right")), []).append(position)
        names = {}
        for number, inside in by_shard.items():
            with OpenShard(self._shards[number]) as shard:
                keys = shard.keys()
            start = int(self._ends[number]) - len(keys)
            names.update({place: SampleName(self._shards[number], keys[place - start]) for place in inside})
        return names


def find_duplicates(
    scans: Sequence[ShardScan], against: Sequence[ShardScan], *, distance_bits: int, listed: int
) -> Duplicates:
    """All duplicates; of groups and matches the first `listed` of each kind are named."""
    where = Locator(scans)
    pictures = _together(scan.image_hashes for scan in scans)
    files = _together(scan.file_hashes for scan in scans)
    keys = _together(scan.key_hashes for scan in scans)
    hashed, filed = np.flatnonzero(pictures != NO_HASH), np.flatnonzero(files != NO_HASH)
    return Duplicates(
        files=_groups(filed, group_near(files[filed], 0), where.of_pictures, listed),
        equal_pictures=_groups(hashed, group_near(pictures[hashed], 0), where.of_pictures, listed),
        near_pictures=_groups(hashed, group_near(pictures[hashed], distance_bits), where.of_pictures, listed),
        distance_bits=distance_bits,
        unhashed=len(pictures) - len(hashed),
        keys=_groups(np.arange(len(keys)), group_near(keys, 0), where.names, listed),
        against=_overlap(pictures, where, against, distance_bits, listed) if against else None,
    )


def _together(arrays: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.zeros(0, dtype=np.uint64), *arrays])


def _groups(positions: NDArray[np.int64], labels: NDArray[np.int64], named: Names, listed: int) -> DuplicateGroups:
    """Groups of equal labels; labels are rows of `positions`, which ascend."""
    sizes = np.bincount(labels, minlength=1)
    heads = np.flatnonzero(sizes > 1)
    members = {int(head): positions[np.flatnonzero(labels == head)].tolist() for head in heads[:listed]}
    names = named(position for group in members.values() for position in group)
    return DuplicateGroups(
        groups=len(heads),
        samples=int(sizes[heads].sum()),
        listed=tuple(tuple(names[position] for position in group) for group in members.values()),
    )


def _overlap(
    pictures: NDArray[np.uint64], where: Locator, against: Sequence[ShardScan], distance_bits: int, listed: int
) -> Overlap:
    others = _together(scan.image_hashes for scan in against)
    hashed = np.flatnonzero(others != NO_HASH)
    rows = np.flatnonzero(pictures != NO_HASH)
    near = HashIndex(others[hashed], distance_bits).nearest(pictures[rows])
    samples, references = rows[near.rows][:listed].tolist(), hashed[near.references][:listed].tolist()
    names, other_names = where.of_pictures(samples), Locator(against).of_pictures(references)
    matches = tuple(
        Match(names[sample], other_names[reference], int(bits))
        for sample, reference, bits in zip(samples, references, near.distances, strict=False)
    )
    return Overlap(len(near.rows), matches)
