"""The index of a folder of shards: all that the start of a run reads, however many shards and samples there are.

What their texts look like is in a file of its own, which a start does not need. Both are gzipped JSON with a second
line, the checksum of all bytes before it. Files of the first format, which had none, are still read; what they say of
local shards is found out anew, for they do not know the shards' content either.
"""

import gzip
import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.shards.sidecar import ShardIndex
from data.shards.statistics import ShardStatistics
from vlm.errors import UserError, reason

NAME = "vlm-index.json.gz"
TEXTS = "vlm-index-texts.json.gz"
FORMAT = "vlm-index-2"
FORMAT_WITHOUT_CHECKSUM = "vlm-index-1"
_LARGEST = 1 << 30  # of the JSON; a million shards need a tenth


class ShardEntry(NamedTuple):
    """Facts about a shard that are known without opening it; `problems` counts what its headers showed to be unusable.

    `content` is the hash in its sidecar; "" where an index of the first format did not say. `imageless` counts the
    samples of texts alone beside its `samples`; None where an index of before they were listed does not say.
    """

    bytes: int | None
    version: str
    samples: int
    labelled: int
    captions: int
    problems: int
    content: str = ""
    imageless: int | None = 0
    imageless_content: str = ""

    @staticmethod
    def of(index: ShardIndex) -> "ShardEntry":
        """The entry of an indexed shard."""
        header, texts = index.header, index.header.statistics
        return ShardEntry(
            bytes=header.bytes,
            version=header.version,
            samples=index.num_with_image,
            labelled=texts.labelled,
            captions=texts.captions,
            problems=len(header.problems),
            content=header.content,
            imageless=None if header.imageless is None else header.imageless.samples,
            imageless_content=header.imageless_content,
        )


_COLUMNS = ShardEntry._fields
_LATER = ("content", "imageless", "imageless_content")  # which early versions did not write
_COUNTS = ("samples", "labelled", "captions", "problems")


@dataclass(frozen=True)
class FolderManifest:
    """The shards of one folder by their names within it."""

    shards: Mapping[str, ShardEntry] = field(default_factory=dict)


def manifest_bytes(manifest: FolderManifest) -> bytes:
    """The content of a manifest file: gzipped JSON, a column a fact."""
    entries = manifest.shards.values()
    columns = {name: [getattr(entry, name) for entry in entries] for name in _COLUMNS}
    return _packed({"format": FORMAT, "names": list(manifest.shards), "shards": columns})


def parse_manifest(content: bytes, where: str) -> FolderManifest:
    """The manifest in a file's content.

    Raises:
        UserError: it is damaged or of another format; `where` is its name.
    """
    with _unpacking(content, where) as values:
        names, stored = values["names"], values["shards"]
        columns = {name: stored[name] for name in _COLUMNS if name not in _LATER}
        columns["content"] = stored["content"] if values["format"] == FORMAT else [""] * len(names)
        columns["imageless"] = stored.get("imageless", [None] * len(names))
        columns["imageless_content"] = stored.get("imageless_content", [""] * len(names))
        _require_possible(names, columns)
        entries = map(ShardEntry._make, zip(*columns.values(), strict=True))
        return FolderManifest(dict(zip(names, entries, strict=True)))


def _require_possible(names: list[str], columns: Mapping[str, list[Any]]) -> None:
    """Raise ValueError where whoever wrote the file meant harm, or mistook what it is."""
    if not _are(names, str) or "/" in "".join(names):
        raise ValueError("it names shards of other folders")
    for name in _COUNTS:
        if not _are(columns[name], int) or not _within(columns[name], 1 << 40):
            raise ValueError(f"{name} that are no counts")
    sizes = [size for size in columns["bytes"] if size is not None]
    if not _are(sizes, int) or not _within(sizes, 1 << 60):
        raise ValueError("sizes that are none")
    imageless = [count for count in columns["imageless"] if count is not None]
    if not _are(imageless, int) or not _within(imageless, 1 << 40):
        raise ValueError("imageless that are no counts")
    if not all(_are(columns[name], str) for name in ("version", "content", "imageless_content")):
        raise ValueError("versions that are no text")


def _are(values: list[Any], kind: type) -> bool:
    return set(map(type, values)) <= {kind}


def _within(values: list[int], limit: int) -> bool:
    return not values or (min(values) >= 0 and max(values) < limit)


def texts_bytes(texts: Mapping[str, ShardStatistics]) -> bytes:
    """The content of a file of statistics by shard."""
    stored = [statistics.model_dump() for statistics in texts.values()]
    return _packed({"format": FORMAT, "names": list(texts), "texts": stored})


def parse_texts(content: bytes, where: str) -> dict[str, ShardStatistics]:
    """The statistics in a file's content by shard. Raises as `parse_manifest`."""
    with _unpacking(content, where) as values:
        texts = (ShardStatistics.model_validate(stored) for stored in values["texts"])
        return dict(zip(values["names"], texts, strict=True))


def _packed(values: dict[str, Any]) -> bytes:
    body = gzip.compress(json.dumps(values, separators=(",", ":")).encode(), compresslevel=6, mtime=0)
    return body + _seal(body)


def _seal(body: bytes) -> bytes:
    """A second member of the gzip file: a line with the checksum of the first."""
    line = b'\n{"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()
    stored = struct.pack("<BHH", 1, len(line), len(line) ^ 0xFFFF) + line  # one block that is not compressed
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + stored + struct.pack("<II", zlib.crc32(line), len(line))


_SEAL_BYTES = len(_seal(b""))


@contextmanager
def _unpacking(content: bytes, where: str) -> Iterator[dict[str, Any]]:
    try:
        body, seal = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
        sealed = bool(body) and seal == _seal(body)
        values = json.loads(_unzipped(body if sealed else content))
        if values["format"] not in (FORMAT, FORMAT_WITHOUT_CHECKSUM):
            raise ValueError(f"its format is {values['format']!r}, not {FORMAT!r}")
        if not sealed and values["format"] == FORMAT:
            raise ValueError("its checksum does not match")
        yield values
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise UserError(f"{where}: is no readable index ({reason(error)}); `vlm data index --fresh` makes it") from None


def _unzipped(content: bytes) -> bytes:
    unzip = zlib.decompressobj(wbits=31)
    plain = unzip.decompress(content, _LARGEST)
    if not unzip.eof:
        raise ValueError("it is cut off, or too large")
    if unzip.unused_data:
        raise ValueError("its checksum does not match")
    return plain
