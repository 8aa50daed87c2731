"""The index of one shard: every sample's id, key and byte offsets, in a small file beside it.

The file ends in a checksum of all that is before it, which every reader compares: 0.5 ms a megabyte, which is some
10,000 samples. A file of the first format, which had none, is not believed: the shard is read anew.
"""

import hashlib
import json
import logging
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as to_safetensors

from data.shards.stamp import Stamp
from data.shards.statistics import ShardStatistics
from data.shards.tar import Extent, Listing, Problem, image_suffix, only
from vlm.atomic import write_bytes
from vlm.config import Config
from vlm.errors import reason

SUFFIX = ".idx"
FORMAT = "vlm-shard-index-2"
FORMAT_WITHOUT_CHECKSUM = "vlm-shard-index-1"
PARTS = ("image", "txt", "json", "cls")
_ARRAYS = {"ids": np.int64, "key_ends": np.int64, "keys": np.uint8, "offsets": np.int64, "sizes": np.int64}
_SEAL = "seal"  # bytes come last in a safetensors file, by name: these are its end
_SEAL_BYTES = 16
_NO_MATCH = "its checksum does not match"

_log = logging.getLogger(__name__)


class Header(Config):
    """Facts in a sidecar about its shard as a whole; `content` is a hash of keys, sizes and texts ("": not read)."""

    format: str = FORMAT
    bytes: int | None
    version: str
    statistics: ShardStatistics
    problems: tuple[Problem, ...]
    content: str = ""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one shard, in the order stored.

    `ids[i]` is a hash of the i-th key; `offsets[i, part]` is 0 for a part that the sample lacks. Loaded from a file,
    the arrays are views of it.
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
        """The extents of the parts of one sample, by "image", "txt", "json" and "cls"."""
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
        suffix = image_suffix(members)
        if suffix is None:
            problems.append(Problem(key, f"it has no image, {only(members)}"))
            continue
        keys.append(key.encode("utf-8", "surrogatepass"))
        rows.append([members[suffix], *(members.get(part, nothing) for part in PARTS[1:])])
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
    arrays[_SEAL] = np.zeros(_SEAL_BYTES, dtype=np.uint8)
    stored = bytes(to_safetensors(arrays, metadata={"index": index.header.model_dump_json()}))[:-_SEAL_BYTES]
    return stored + _seal(memoryview(stored))


def save_index(index: ShardIndex, path: Path) -> None:
    """Write the sidecar aside and rename it, so that any number of processes may write it at once.

    Raises:
        OSError: the folder cannot be written.
    """
    write_bytes(path, to_bytes(index))


def load_index(path: Path) -> ShardIndex | None:
    """The sidecar in `path`, its arrays mapped; None where there is none, or one that is damaged, with a warning."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: it is empty
        _log.warning("%s", _unreadable(str(path), getattr(error, "strerror", None) or "it is empty"))
        return None
    return parse_index(content, str(path))


def parse_index(content: mmap.mmap | bytes, where: str) -> ShardIndex | None:
    """The index in a sidecar's content; None where it is damaged, with a warning, or of an earlier format."""
    with memoryview(content) as view:
        is_intact = bytes(view[-_SEAL_BYTES:]) == _seal(view[:-_SEAL_BYTES])
    try:
        (length,) = struct.unpack_from("<Q", content)
        layout: Mapping[str, Any] = json.loads(content[8 : 8 + min(length, len(content))])
        header = Header.model_validate_json(layout["__metadata__"]["index"])
        if header.format == FORMAT_WITHOUT_CHECKSUM:
            return None
        if header.format != FORMAT:
            raise ValueError(f"its format is {header.format!r:.60}, not {FORMAT!r}")
        arrays = {name: _array(content, 8 + length, layout[name], kind) for name, kind in _ARRAYS.items()}
        _require_possible(arrays)
    except (struct.error, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        _log.warning("%s", _unreadable(where, reason(error) if is_intact else _NO_MATCH))
        return None
    if not is_intact:
        _log.warning("%s", _unreadable(where, _NO_MATCH))
        return None
    return ShardIndex(header, **arrays)


def _require_possible(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise ValueError where whoever wrote the file meant harm: a right checksum, and places that cannot be."""
    ends, samples = arrays["key_ends"], len(arrays["ids"])
    shapes = arrays["offsets"].shape == arrays["sizes"].shape == (samples, len(PARTS)) and ends.shape == (samples,)
    if not shapes or min(int(arrays[name].min(initial=0)) for name in ("offsets", "sizes", "key_ends")) < 0:
        raise ValueError("its parts do not fit together")
    if samples and (int(np.diff(ends).min(initial=0)) < 0 or int(ends[-1]) != len(arrays["keys"])):
        raise ValueError("its parts do not fit together")


def _unreadable(where: str, why: str) -> str:
    return f"{where}: is damaged ({why}); the headers of its shard are read instead, `vlm data index --fresh` mends it"


def _seal(stored: memoryview) -> bytes:
    return hashlib.sha256(stored).digest()[:_SEAL_BYTES]


def _array(content: mmap.mmap | bytes, start: int, layout: Mapping[str, Any], kind: Any) -> NDArray[Any]:
    first, _ = layout["data_offsets"]
    shape = layout["shape"]
    return np.frombuffer(content, dtype=kind, count=math.prod(shape), offset=start + first).reshape(shape)
