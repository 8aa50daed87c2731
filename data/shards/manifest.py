"""The index of a folder of shards: all that the start of a run reads, however many shards and samples there are.

What their texts look like is in a file of its own, which a start does not need.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError

from data.shards.sidecar import ShardIndex
from data.shards.statistics import ShardStatistics
from vlm.errors import UserError, reason

NAME = "vlm-index.json.gz"
TEXTS = "vlm-index-texts.json.gz"
FORMAT = "vlm-index-1"


class ShardEntry(NamedTuple):
    """What is known of a shard without opening it; `problems` counts what its headers showed to be unusable."""

    bytes: int | None
    version: str
    samples: int
    labelled: int
    captions: int
    problems: int

    @staticmethod
    def of(index: ShardIndex) -> "ShardEntry":
        """The entry of an indexed shard."""
        header, texts = index.header, index.header.statistics
        return ShardEntry(
            bytes=header.bytes,
            version=header.version,
            samples=len(index),
            labelled=texts.labelled,
            captions=texts.captions,
            problems=len(header.problems),
        )


_COLUMNS = ShardEntry._fields


@dataclass(frozen=True)
class Manifest:
    """The shards of one folder by their names within it."""

    shards: Mapping[str, ShardEntry] = field(default_factory=dict)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of a manifest file: gzipped JSON, a column a fact."""
    entries = manifest.shards.values()
    columns = {name: [getattr(entry, name) for entry in entries] for name in _COLUMNS}
    return _packed({"format": FORMAT, "names": list(manifest.shards), "shards": columns})


def parse_manifest(content: bytes, where: str) -> Manifest:
    """The manifest in a file's content.

    Raises:
        UserError: it is damaged or of another format; `where` is its name.
    """
    with _unpacking(content, where) as values:
        entries = (ShardEntry(*row) for row in zip(*(values["shards"][name] for name in _COLUMNS), strict=True))
        return Manifest(dict(zip(values["names"], entries, strict=True)))


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
    return gzip.compress(json.dumps(values, separators=(",", ":")).encode(), compresslevel=6, mtime=0)


@contextmanager
def _unpacking(content: bytes, where: str) -> Iterator[dict[str, Any]]:
    try:
        values = json.loads(gzip.decompress(content))
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}, not {FORMAT!r}")
        yield values
    except (OSError, EOFError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{where}: is no readable index ({reason(error)}); `vlm data index --fresh` makes it") from None
