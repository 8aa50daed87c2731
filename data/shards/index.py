"""What is in the shards of a source: every sample's id, key and byte offsets, from the tar headers alone."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.bad_sample import BadSampleError
from data.captions import CAPTION_SUFFIXES, read_captions, read_fields
from data.shards.patterns import expand_shards
from data.shards.tar import IMAGE_SUFFIXES, Extent, Listing, ShardReader, list_shard
from data.shards.unpack import plain_shard
from vlm.batch import Skip
from vlm.errors import UserError

_PARTS = ("image", "txt", "json", "cls")
_PROBED = 64


@dataclass(frozen=True)
class Sample:
    """One sample: where it is stored, and which members it has."""

    source: str
    shard: Path
    key: str
    id: int
    extents: dict[str, Extent]
    file: Path

    def read(self, part: str, reader: ShardReader) -> bytes | None:
        """The bytes of its "image", "txt", "json" or "cls" member; None when it has none."""
        extent = self.extents.get(part)
        return None if extent is None else reader.read(self.file, extent)

    def image(self, reader: ShardReader) -> bytes:
        """The stored image file."""
        return reader.read(self.file, self.extents["image"])

    def fields(self, reader: ShardReader) -> dict[str, Any]:
        """Everything that its json member holds."""
        return read_fields(self.read("json", reader))

    def captions(self, reader: ShardReader) -> tuple[str, ...]:
        """All its captions, stripped, without empty ones."""
        return read_captions(self.read("txt", reader), self.fields(reader))

    def label(self, reader: ShardReader) -> int | None:
        """The class in its cls member; None when it has none.

        Raises:
            BadSampleError: the member is no whole number of at least 0.
        """
        stored = self.read("cls", reader)
        if stored is None:
            return None
        if not stored.strip().isdigit():
            raise BadSampleError(f"its cls is no class number but {stored[:20]!r}")
        return int(stored)

    def skip(self, reason: str, substitute: str = "") -> Skip:
        """The record of this sample being left out."""
        return Skip(self.source, str(self.shard), self.key, reason, substitute)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard as arrays; `extents[i, part]` is (offset, size), with offset 0 for a part it lacks."""

    shard: Path
    file: Path
    keys: tuple[str, ...]
    ids: NDArray[np.int64]
    extents: NDArray[np.int64]


class SourceIndex:
    """The samples of one source, numbered in the order of its shards and of their members.

    `problems` tells what was found unusable while the headers were read: cut shards, samples without an image.
    """

    def __init__(self, name: str, shards: Sequence[ShardIndex], problems: Sequence[Skip]) -> None:
        self.name = name
        self.shards = tuple(shards)
        self.problems = tuple(problems)
        self._ends = np.cumsum([len(shard.keys) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(number)
        place = int(np.searchsorted(self._ends, number, side="right"))
        shard = self.shards[place]
        row = number - int(self._ends[place]) + len(shard.keys)
        extents = {
            part: Extent(int(offset), int(size))
            for part, (offset, size) in zip(_PARTS, shard.extents[row], strict=True)
            if offset
        }
        return Sample(self.name, shard.shard, shard.keys[row], int(shard.ids[row]), extents, shard.file)

    def ids(self, numbers: NDArray[np.int64]) -> set[int]:
        """The ids of the samples with these numbers."""
        places = np.searchsorted(self._ends, numbers, side="right")
        return {
            int(self.shards[place].ids[number - self._ends[place] + len(self.shards[place].keys)])
            for place, number in zip(places, numbers, strict=True)
        }

    def all_have(self, part: str) -> bool:
        """Whether every sample has this part ("image", "txt", "json" or "cls")."""
        column = _PARTS.index(part)
        return all(bool(shard.extents[:, column, 0].all()) for shard in self.shards)


def index_source(
    name: str, patterns: Sequence[str], *, root: str | None = None, cache: str | None = None, where: str | None = None
) -> SourceIndex:
    """Index the shards that `patterns` name; `where` is the key to blame in messages (default: the source's).

    Raises:
        UserError: a pattern matches nothing, a file is no tar, or no shard holds an image.
    """
    key = where or f"data.sources.{name}.shards"
    shards = expand_shards(patterns, root, key)
    folder = os.path.commonpath([shard.absolute().parent for shard in shards])

    def index(shard: Path) -> tuple[ShardIndex, list[Skip]]:
        file = plain_shard(shard, cache, key)
        return _index_shard(name, shard, file, list_shard(file, shard, key), os.path.relpath(shard.absolute(), folder))

    with ThreadPoolExecutor(min(16, len(shards))) as pool:
        indexed = list(pool.map(index, shards))
    source = SourceIndex(name, [shard for shard, _ in indexed], [skip for _, skips in indexed for skip in skips])
    if not len(source):
        raise UserError(f"{key}: no image ({', '.join(IMAGE_SUFFIXES)}) in {shards[0]}{_more(len(shards) - 1)}")
    return source


def _index_shard(
    source: str, shard: Path, file: Path, listing: Listing, stable_name: str
) -> tuple[ShardIndex, list[Skip]]:
    skips = [Skip(source, str(shard), problem.key, problem.reason, "") for problem in listing.problems]
    keys: list[str] = []
    rows: list[list[Extent]] = []
    nothing = Extent(0, 0)
    for key, members in listing.samples.items():
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if image is None:
            skips.append(Skip(source, str(shard), key, f"it has no image, only {', '.join(members)}", ""))
            continue
        keys.append(key)
        rows.append([image, *(members.get(part, nothing) for part in _PARTS[1:])])
    ids = np.fromiter((sample_id(source, stable_name, key) for key in keys), dtype=np.int64, count=len(keys))
    extents = np.asarray(rows, dtype=np.int64).reshape(len(rows), len(_PARTS), 2)
    return ShardIndex(shard, file, tuple(keys), ids, extents), skips


def sample_id(source: str, shard: str, key: str) -> int:
    """A stable 64-bit name of a sample: a hash of its source, its shard's name within the source, and its key."""
    text = f"{source}\x00{shard}\x00{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def require_captions(source: SourceIndex, reader: ShardReader, where: str) -> None:
    """Refuse a source whose first samples hold no caption field at all; single missing captions are left to the stream.

    Raises:
        UserError: naming the source, its first shard and the fields found instead.
    """
    found: dict[str, None] = {}
    for number in range(0, len(source), max(1, len(source) // _PROBED)):
        sample = source[number]
        if "txt" in sample.extents:
            return
        try:
            fields = sample.fields(reader)
        except (BadSampleError, OSError):
            continue
        if "captions" in fields or "caption" in fields:
            return
        found.update(
            dict.fromkeys([*(part for part in sample.extents if part != "json"), *(f"json:{f}" for f in fields)])
        )
    expected = f"{CAPTION_SUFFIXES[0]}, or {CAPTION_SUFFIXES[1]} with `captions` or `caption`"
    raise UserError(
        f"{where}: no caption field in {source.shards[0].shard}{_more(len(source.shards) - 1)}: "
        f"expected {expected}; found {', '.join(found) or 'nothing readable'}"
    )


def _more(num_shards: int) -> str:
    return f" and {num_shards} more" if num_shards else ""
