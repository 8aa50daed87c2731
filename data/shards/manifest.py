"""The index of a folder of shards: all that the start of a run reads, however many shards and samples there are."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from data.shards.sidecar import ShardIndex
from data.shards.statistics import ShardStatistics
from vlm.errors import UserError

NAME = "vlm-index.json.gz"
FORMAT = "vlm-index-1"


class ShardEntry(NamedTuple):
    """What is known of a shard without opening it; `problems` counts what its headers showed to be unusable.

    `texts` is the shard's statistics as they are stored: a start does not need them, so they are not taken apart.
    """

    bytes: int | None
    version: str
    samples: int
    labelled: int
    captions: int
    problems: int
    texts: str

    @property
    def statistics(self) -> ShardStatistics:
        """The statistics of the shard's texts."""
        return ShardStatistics.model_validate_json(self.texts)

    @staticmethod
    def of(index: ShardIndex) -> "ShardEntry":
        """The entry of an indexed shard."""
        header = index.header
        texts = header.statistics
        return ShardEntry(
            bytes=header.bytes,
            version=header.version,
            samples=len(index),
            labelled=texts.labelled,
            captions=texts.captions,
            problems=len(header.problems),
            texts=texts.model_dump_json(),
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
    content = {"format": FORMAT, "names": list(manifest.shards), "shards": columns}
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), compresslevel=6, mtime=0)


def parse_manifest(content: bytes, where: str) -> Manifest:
    """The manifest in a file's content.

    Raises:
        UserError: it is damaged or of another format; `where` is its name.
    """
    try:
        values = json.loads(gzip.decompress(content))
        if values["format"] == FORMAT:
            columns = [values["shards"][name] for name in _COLUMNS]
            entries = (ShardEntry(*row) for row in zip(*columns, strict=True))
            return Manifest(dict(zip(values["names"], entries, strict=True)))
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: is no readable index ({type(error).__name__}); run `vlm data index` again") from None
    raise UserError(f"{where}: format {values['format']!r} is not {FORMAT!r}; run `vlm data index` again")
