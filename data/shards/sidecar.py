"""The index of one shard: every sample's id, key and byte offsets, in a small file beside it."""

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import save as to_safetensors

from data.shards.stamp import Stamp
from data.shards.statistics import ShardStatistics
from data.shards.tar import IMAGE_SUFFIXES, Extent, Listing, Problem
from vlm.atomic import write_bytes
from vlm.config import Config

SUFFIX = ".idx"
FORMAT = "vlm-shard-index-1"
PARTS = ("image", "txt", "json", "cls")
_ARRAYS = {"ids": np.int64, "key_ends": np.int64, "keys": np.uint8, "offsets": np.int64, "sizes": np.int64}


class Header(Config):
    """What a sidecar says about its shard as a whole."""

    format: str = FORMAT
    bytes: int | None
    version: str
    statistics: ShardStatistics
    problems: tuple[Problem, ...]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one shard, in the order stored.

    `ids[i]` is a hash of the i-th key; `offsets[i, part]` is 0 for a part that the sample lacks. Loaded from a file,
    the arrays are views of it: opening costs the same for any number of samples.
    """

    header: Header
    ids: NDArray[np.int64]
    key_ends: NDArray[np.int64]
    keys: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def stamp(self) -> Stamp:
        """The state of the shard that this index describes."""
        return Stamp(self.header.bytes, self.header.version)

    def key(self, row: int) -> str:
        """The key of one sample."""
        start = self.key_ends[row - 1] if row else 0
        return self.keys[start : self.key_ends[row]].tobytes().decode("utf-8", "surrogatepass")

    def extents(self, row: int) -> dict[str, Extent]:
        """Where the parts of one sample lie, by "image", "txt", "json" and "cls"."""
        offsets, sizes = self.offsets[row].tolist(), self.sizes[row].tolist()
        return {part: Extent(offset, size) for part, offset, size in zip(PARTS, offsets, sizes, strict=True) if offset}

    def same_keys(self, other: "ShardIndex") -> bool:
        """Whether both list the same samples in the same order."""
        return np.array_equal(self.key_ends, other.key_ends) and np.array_equal(self.keys, other.keys)


def make_index(listing: Listing, stamp: Stamp) -> ShardIndex:
    """The index of a shard with these members, without statistics of its captions."""
    keys, rows, problems = [], [], list(listing.problems)
    nothing = Extent(0, 0)
    for key, members in listing.samples.items():
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if image is None:
            problems.append(Problem(key, f"it has no image, only {', '.join(members)}"))
            continue
        keys.append(key.encode("utf-8", "surrogatepass"))
        rows.append([image, *(members.get(part, nothing) for part in PARTS[1:])])
    extents = np.asarray(rows, dtype=np.int64).reshape(len(rows), len(PARTS), 2)
    statistics = ShardStatistics(samples=len(keys), labelled=int((extents[:, PARTS.index("cls"), 0] > 0).sum()))
    return ShardIndex(
        Header(bytes=stamp.size, version=stamp.version, statistics=statistics, problems=tuple(problems)),
        ids=np.fromiter((key_id(key) for key in keys), dtype=np.int64, count=len(keys)),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        keys=np.frombuffer(b"".join(keys), dtype=np.uint8),
        offsets=np.ascontiguousarray(extents[:, :, 0]),
        sizes=np.ascontiguousarray(extents[:, :, 1]),
    )


def key_id(key: bytes) -> int:
    """A stable 64-bit hash of a sample's key."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)


def to_bytes(index: ShardIndex) -> bytes:
    """The sidecar's content: a safetensors file."""
    arrays = {name: np.asarray(getattr(index, name), dtype=kind) for name, kind in _ARRAYS.items()}
    return bytes(to_safetensors(arrays, metadata={"index": index.header.model_dump_json()}))


def save_index(index: ShardIndex, path: Path) -> None:
    """Write the sidecar aside and rename it, so that any number of processes may write it at once.

    Raises:
        OSError: the folder cannot be written.
    """
    write_bytes(path, to_bytes(index))


def load_index(path: Path) -> ShardIndex | None:
    """The sidecar in `path`, its arrays mapped and not read; None where there is none, or no readable one."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    return parse_index(content)


def parse_index(content: mmap.mmap | bytes) -> ShardIndex | None:
    """The index in a sidecar's content; None where it is damaged or of another format."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        layout: Mapping[str, Any] = json.loads(content[8 : 8 + length])
        header = Header.model_validate_json(layout["__metadata__"]["index"])
        if header.format != FORMAT:
            return None
        arrays = {name: _array(content, 8 + length, layout[name], kind) for name, kind in _ARRAYS.items()}
    except (struct.error, KeyError, ValueError, TypeError, ValidationError):
        return None
    return ShardIndex(header, **arrays)


def _array(content: mmap.mmap | bytes, start: int, layout: Mapping[str, Any], kind: Any) -> NDArray[Any]:
    first, _ = layout["data_offsets"]
    shape = layout["shape"]
    return np.frombuffer(content, dtype=kind, count=math.prod(shape), offset=start + first).reshape(shape)
