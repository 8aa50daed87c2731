"""The index of one shard: every sample's id, key and byte offsets, in a small file beside it.

The file ends in a checksum of all that is before it, which every reader compares: 0.5 ms a megabyte, which is some
10,000 samples. A file of the first format, which had none, is not believed: the shard is read anew. Where a shard has
documents, arrays of their images come on top; files without are as they were before there were any.
"""

import hashlib
import json
import logging
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as to_safetensors

from data.shards.stamp import Stamp
from data.shards.statistics import ShardStatistics
from data.shards.tar import NO_IMAGE, Extent, Listing, Problem, document_images, image_suffix, only
from vlm.atomic import write_bytes
from vlm.config import Config
from vlm.errors import reason

SUFFIX = ".idx"
FORMAT = "vlm-shard-index-2"
FORMAT_WITHOUT_CHECKSUM = "vlm-shard-index-1"
PARTS = ("image", "txt", "json", "cls")
_ARRAYS = {"ids": np.int64, "key_ends": np.int64, "keys": np.uint8, "offsets": np.int64, "sizes": np.int64}
_OF_DOCUMENTS = {
    "image_ends": np.int64,
    "image_offsets": np.int64,
    "image_sizes": np.int64,
    "image_name_ends": np.int64,
    "image_names": np.uint8,
}
_SEAL = "seal"  # bytes come last in a safetensors file, by name: these are its end
_SEAL_BYTES = 16
_ASCII = 128
_CONTINUES_MASK, _CONTINUES = 0b1100_0000, 0b1000_0000  # of bytes of UTF-8 within a character
_NO_MATCH = "its checksum does not match"

_log = logging.getLogger(__name__)


class Header(Config):
    """Facts in a sidecar about its shard as a whole; `content` is a hash of keys, sizes and texts ("": not read).

    `statistics` and `content` are of the samples with an image, `imageless` and `imageless_content` of those that have
    a txt or json alone (None: of an index that did not list them), which are problems too for whoever needs images.
    """

    format: str = FORMAT
    bytes: int | None
    version: str
    statistics: ShardStatistics
    problems: tuple[Problem, ...]
    content: str = ""
    imageless: ShardStatistics | None = None
    imageless_content: str = ""


@dataclass(frozen=True, eq=False)
class DocumentImages:
    """The images of the documents of one shard, `image_ends[i - 1]` to `image_ends[i]` those of its i-th sample."""

    image_ends: NDArray[np.int64]
    image_offsets: NDArray[np.int64]
    image_sizes: NDArray[np.int64]
    image_name_ends: NDArray[np.int64]
    image_names: NDArray[np.uint8]

    def of(self, row: int) -> dict[str, Extent]:
        """The extents of the images of one sample by their members' suffixes."""
        start, stop = (self.image_ends[row - 1] if row else 0), self.image_ends[row]
        extents = {}
        for number in range(start, stop):
            name_start = self.image_name_ends[number - 1] if number else 0
            name = self.image_names[name_start : self.image_name_ends[number]].tobytes()
            extent = Extent(int(self.image_offsets[number]), int(self.image_sizes[number]))
            extents[name.decode("utf-8", "surrogatepass")] = extent
        return extents


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one shard, in the order stored: those with an image, then those of texts alone.

    `ids[i]` is a hash of the i-th key; `offsets[i, part]` is 0 for a part that the sample lacks. `images` are those of
    documents, beside the one image of a pair. Loaded from a file, the arrays are views of it.
    """

    header: Header
    ids: NDArray[np.int64]
    key_ends: NDArray[np.int64]
    keys: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    images: DocumentImages | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_with_image(self) -> int:
        """So many of the samples, the first, have an image."""
        return len(self) - (0 if self.header.imageless is None else self.header.imageless.samples)

    @property
    def stamp(self) -> Stamp:
        """The state of the shard that this index describes."""
        return Stamp(self.header.bytes, self.header.version)

    def key(self, row: int) -> str:
        """The key of one sample."""
        start = self.key_ends[row - 1] if row else 0
        return self.keys[start : self.key_ends[row]].tobytes().decode("utf-8", "surrogatepass")

    def extents(self, row: int) -> dict[str, Extent]:
        """The extents of the parts of one sample: "image", "txt", "json", "cls", and a document's images by suffix."""
        offsets, sizes = self.offsets[row].tolist(), self.sizes[row].tolist()
        extents = {
            part: Extent(offset, size) for part, offset, size in zip(PARTS, offsets, sizes, strict=True) if offset
        }
        return extents if self.images is None else {**self.images.of(row), **extents}

    def same_keys(self, other: "ShardIndex") -> bool:
        """Whether both list the same samples in the same order; of those without an image, if both list them."""
        knows_all = self.header.imageless is not None and other.header.imageless is not None
        mine, others = (
            index.key_ends if knows_all else index.key_ends[: index.num_with_image] for index in (self, other)
        )
        if not np.array_equal(mine, others):
            return False
        num_bytes = int(mine[-1]) if len(mine) else 0
        return np.array_equal(self.keys[:num_bytes], other.keys[:num_bytes])


class _Row(NamedTuple):
    """A sample that an index lists: its key, the extents of its `PARTS`, and a document's images by suffix."""

    key: bytes
    extents: list[Extent]
    images: dict[str, Extent]


def make_index(listing: Listing, stamp: Stamp) -> ShardIndex:
    """The index of a shard with these members, without statistics of its captions."""
    with_image, imageless, problems = _rows_of(listing)
    rows = [*with_image, *imageless]
    extents = np.asarray([row.extents for row in rows], dtype=np.int64).reshape(len(rows), len(PARTS), 2)
    labelled = extents[: len(with_image), PARTS.index("cls"), 0] > 0
    statistics = ShardStatistics(
        samples=len(with_image),
        labelled=int(labelled.sum()),
        documents=sum(bool(row.images) for row in rows),
        document_images=sum(len(row.images) for row in rows),
    )
    return ShardIndex(
        Header(
            bytes=stamp.size,
            version=stamp.version,
            statistics=statistics,
            problems=tuple(problems),
            imageless=ShardStatistics(samples=len(imageless)),
        ),
        ids=np.fromiter((key_id(row.key) for row in rows), dtype=np.int64, count=len(rows)),
        key_ends=np.cumsum([len(row.key) for row in rows], dtype=np.int64),
        keys=np.frombuffer(b"".join(row.key for row in rows), dtype=np.uint8),
        offsets=np.ascontiguousarray(extents[:, :, 0]),
        sizes=np.ascontiguousarray(extents[:, :, 1]),
        images=_images_of([row.images for row in rows]) if statistics.documents else None,
    )


def _rows_of(listing: Listing) -> tuple[list[_Row], list[_Row], list[Problem]]:
    """The samples with an image, or several; those of texts alone, which are problems too; and all problems."""
    with_image, imageless, problems = list[_Row](), list[_Row](), list(listing.problems)
    nothing = Extent(0, 0)
    for key, members in listing.samples.items():
        suffix, in_document = image_suffix(members), document_images(members)
        texts = [members.get(part, nothing) for part in PARTS[1:]]
        extents = [members[suffix] if suffix else nothing, *texts]
        row = _Row(key.encode("utf-8", "surrogatepass"), extents, in_document)
        if suffix is not None or in_document:
            with_image.append(row)
            continue
        problems.append(Problem(key, f"{NO_IMAGE}, {only(members)}"))
        if "txt" in members or "json" in members:
            imageless.append(row)
    return with_image, imageless, problems


def _images_of(by_sample: Sequence[Mapping[str, Extent]]) -> DocumentImages:
    extents = [extent for images in by_sample for extent in images.values()]
    names = [name.encode("utf-8", "surrogatepass") for images in by_sample for name in images]
    return DocumentImages(
        image_ends=np.cumsum([len(images) for images in by_sample], dtype=np.int64),
        image_offsets=np.asarray([extent.offset for extent in extents], dtype=np.int64),
        image_sizes=np.asarray([extent.size for extent in extents], dtype=np.int64),
        image_name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        image_names=np.frombuffer(b"".join(names), dtype=np.uint8),
    )


def key_id(key: bytes) -> int:
    """A stable 64-bit hash of a sample's key."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)


def to_bytes(index: ShardIndex) -> bytes:
    """The sidecar's content: a safetensors file."""
    arrays = {name: np.asarray(getattr(index, name), dtype=kind) for name, kind in _ARRAYS.items()}
    if index.images is not None:
        arrays |= {name: np.asarray(getattr(index.images, name), dtype=kind) for name, kind in _OF_DOCUMENTS.items()}
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
        has_documents = "image_ends" in layout
        kinds = {**_ARRAYS, **(_OF_DOCUMENTS if has_documents else {})}
        arrays = {name: _array(content, 8 + length, layout[name], kind) for name, kind in kinds.items()}
        _require_possible(header, arrays)
    except (struct.error, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        _log.warning("%s", _unreadable(where, reason(error) if is_intact else _NO_MATCH))
        return None
    if not is_intact:
        _log.warning("%s", _unreadable(where, _NO_MATCH))
        return None
    images = DocumentImages(**{name: arrays.pop(name) for name in _OF_DOCUMENTS}) if has_documents else None
    return ShardIndex(header, **arrays, images=images)


def _require_possible(header: Header, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise ValueError where whoever wrote the file meant harm: a right checksum, and places that cannot be."""
    ends, samples = arrays["key_ends"], len(arrays["ids"])
    shapes = arrays["offsets"].shape == arrays["sizes"].shape == (samples, len(PARTS)) and ends.shape == (samples,)
    if not shapes or min(int(arrays[name].min(initial=0)) for name in ("offsets", "sizes", "key_ends")) < 0:
        raise ValueError("its parts do not fit together")
    fits = _are_texts(ends, arrays["keys"]) and (header.imageless is None or header.imageless.samples <= samples)
    if "image_ends" in arrays:
        counts = {len(arrays[name]) for name in ("image_offsets", "image_sizes", "image_name_ends")}
        fits &= arrays["image_ends"].shape == (samples,) and len(counts) == 1
        fits &= _divide(arrays["image_ends"], counts.pop())
        fits &= _are_texts(arrays["image_name_ends"], arrays["image_names"])
        fits &= min(int(arrays[name].min(initial=0)) for name in _OF_DOCUMENTS) >= 0
    if not fits:
        raise ValueError("its parts do not fit together")


def _are_texts(ends: NDArray[Any], stored: NDArray[Any]) -> bool:
    """Whether texts in UTF-8, surrogates allowed, end at these places of what is stored."""
    if not _divide(ends, len(stored)):
        return False
    if int(stored.max(initial=0)) < _ASCII:
        return True
    stored.tobytes().decode("utf-8", "surrogatepass")
    starts = stored[ends[ends < len(stored)]]
    return not ((starts & _CONTINUES_MASK) == _CONTINUES).any()


def _divide(ends: NDArray[Any], length: int) -> bool:
    """Whether so many things end at these places, one after another."""
    if not len(ends):
        return length == 0
    return int(ends[0]) >= 0 and int(np.diff(ends).min(initial=0)) >= 0 and int(ends[-1]) == length


def _unreadable(where: str, why: str) -> str:
    return f"{where}: is damaged ({why}); the headers of its shard are read instead, `vlm data index --fresh` mends it"


def _seal(stored: memoryview) -> bytes:
    return hashlib.sha256(stored).digest()[:_SEAL_BYTES]


def _array(content: mmap.mmap | bytes, start: int, layout: Mapping[str, Any], kind: Any) -> NDArray[Any]:
    first, _ = layout["data_offsets"]
    shape = layout["shape"]
    return np.frombuffer(content, dtype=kind, count=math.prod(shape), offset=start + first).reshape(shape)
