"""Reading of samples by shard and row, with the most recently used shards open, per process."""

import os
import resource
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.samples.bad_sample import BadSampleError
from data.shards.cache import ShardCache
from data.shards.headers import BLOCK, is_header_of
from data.shards.indexing import Indexer
from data.shards.retry import UnavailableError, is_temporary, retried
from data.shards.sidecar import PARTS, ShardIndex, make_index
from data.shards.stamp import Stamp
from data.shards.tar import Extent, list_shard, read_extent
from vlm.errors import UserError

# Parts of a sample that lie closer than this are read in one call.
_GAP = 4096
_ASK_AGAIN_SECONDS = 300.0
_FILES_A_SHARD = 2  # the shard, and its mapped index
_OTHER_FILES = 512


@dataclass(frozen=True)
class _OpenShard:
    """A shard's file and its index; no index where its samples are not those that were indexed."""

    descriptor: int
    index: ShardIndex | None


class ShardReader:
    """Reader of members by offset, from local shards and from the local copies of all others.

    Pickling (into a loading worker) leaves the open files behind.
    """

    def __init__(self, cache: ShardCache, max_open: int = 1024) -> None:
        self.cache = cache
        self._max_open = max_open
        self._limit: int | None = None
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self._unavailable: dict[str, tuple[float, UnavailableError]] = {}

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[ShardCache, int]]:
        return ShardReader, (self.cache, self._max_open)

    def index(self, shard: str, stamp: Stamp, row: int) -> ShardIndex:
        """The index of the shard that had this `stamp` when its source was indexed; `row` is to be looked up in it.

        Raises:
            OSError: the shard is gone or cannot be read.
            BadSampleError: it holds other samples now, or fewer than its folder's index says.
        """
        index = self._open_shard(shard, stamp).index
        if index is None:
            raise BadSampleError("its shard has changed since it was indexed; `vlm data index` reads it anew")
        if row >= len(index):
            raise BadSampleError(
                "its shard holds fewer samples than its folder's index says; see `vlm data index --fresh`"
            )
        return index

    def read(self, shard: str, stamp: Stamp, row: int, parts: Sequence[str] = PARTS) -> dict[str, bytes]:
        """The stored bytes of those `parts` that the sample in this row has.

        Raises:
            OSError: the shard is gone, unreadable or shorter than its index says.
            BadSampleError: it holds other samples now.
        """
        try:
            return self._read_once(shard, stamp, row, parts)
        except OSError as error:
            if error.errno is None or not is_temporary(error):
                raise
        # A file server that failed for a moment: what was open may be stale.
        return retried(shard, self.cache.retry, lambda: self._read_once(shard, stamp, row, parts, anew=True))

    def _read_once(
        self, shard: str, stamp: Stamp, row: int, parts: Sequence[str], *, anew: bool = False
    ) -> dict[str, bytes]:
        if anew and shard in self._open:
            os.close(self._open.pop(shard).descriptor)
        extents = self.index(shard, stamp, row).extents(row)
        return _read(self._open[shard].descriptor, {part: extents[part] for part in parts if part in extents})

    def _open_shard(self, shard: str, stamp: Stamp) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        self._raise_again(shard)
        if self._limit is None:
            self._limit = min(self._max_open, _allow_open(self._max_open))
        while len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1].descriptor)
        try:
            shard_file = self._open[shard] = self._fresh(shard, stamp)
        except UnavailableError as error:
            self._unavailable[shard] = (time.monotonic(), error)
            raise
        return shard_file

    def _raise_again(self, shard: str) -> None:
        """A shard that could not be had after all retries is not asked for again at each of its samples."""
        if shard in self._unavailable:
            when, error = self._unavailable[shard]
            if time.monotonic() - when < _ASK_AGAIN_SECONDS:
                raise error
            del self._unavailable[shard]

    def _fresh(self, shard: str, expected: Stamp) -> _OpenShard:
        """Open a shard that is as it was indexed, or one that was stored anew with the same samples."""
        descriptor, stamp = handle = self.cache.open(shard, expected)
        try:
            indexer = Indexer(self.cache, shard)
            stored_index = indexer.find(shard, stamp)
            fits = stored_index is not None and _fits(descriptor, stored_index)
            index = stored_index if stored_index is not None and fits else _listed(handle.path, shard, stamp)
            before = stored_index if stamp == expected else indexer.find(shard, expected)
            unknown = stamp == expected and before is None  # its index was lost: nothing says that it changed
            same = unknown or (before is not None and index.same_keys(before))
        except BaseException:
            os.close(descriptor)
            raise
        return _OpenShard(descriptor, index if same else None)

    def close(self) -> None:
        """Close every file; the reader stays usable."""
        while self._open:
            os.close(self._open.popitem()[1].descriptor)

    def __del__(self) -> None:
        self.close()


def _allow_open(shards: int) -> int:
    """Raise this process's limit on open files for so many shards, as far as it may; how many that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _FILES_A_SHARD * shards + _OTHER_FILES
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(1, (max(soft, allowed) - _OTHER_FILES) // _FILES_A_SHARD)


def _fits(descriptor: int, index: ShardIndex) -> bool:
    """Whether the first, middle and last sample lie where the index says: a shard may be replaced unnoticed."""
    for row in {0, len(index) // 2, len(index) - 1} if len(index) else ():
        offset, size = next(iter(index.extents(row).values()), Extent(0, 0))
        if offset < BLOCK or not is_header_of(os.pread(descriptor, BLOCK, offset - BLOCK), index.key(row), size):
            return False
    return True


def _listed(path: Path, shard: str, stamp: Stamp) -> ShardIndex:
    try:
        return make_index(list_shard(path, shard, "shard"), stamp)
    except UserError as error:
        raise OSError("its shard is no tar any more") from error


def _read(descriptor: int, extents: dict[str, Extent]) -> dict[str, bytes]:
    """All extents, in one call where they lie side by side, as a sample's members do."""
    if not extents:
        return {}
    start = min(extent.offset for extent in extents.values())
    stop = max(extent.offset + extent.size for extent in extents.values())
    if stop - start > sum(extent.size for extent in extents.values()) + _GAP * len(extents):
        return {part: read_extent(descriptor, extent) for part, extent in extents.items()}
    data = read_extent(descriptor, Extent(start, stop - start))
    return {part: data[offset - start : offset - start + size] for part, (offset, size) in extents.items()}
