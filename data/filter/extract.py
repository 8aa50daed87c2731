"""Pass 1: one shard into two Parquet files, a row for each caption and a count for each unigram and bigram."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data.check.picture import NO_HASH, picture_info
from data.check.samples import (
    NO_CAPTION,
    REPEATED_MEMBER,
    UNDECODABLE_IMAGE,
    FindingError,
    OpenShard,
    StoredSample,
    hash64,
    shard_state,
)
from data.filter.words import gram_ids, grams, normal_form
from data.samples.bad_sample import BadSampleError
from vlm.atomic import write_bytes

FORMAT: Final = 1  # raised whenever the rows of an unchanged shard would change
ROWS: Final = pa.schema(
    [
        ("sample", pa.uint32()),  # its place in the shard; places behind the last are what the tar lost or refused
        ("key", pa.string()),
        ("unusable", pa.string()),  # why, or null
        ("width", pa.uint32()),
        ("height", pa.uint32()),
        ("file_id", pa.uint64()),
        ("url_id", pa.uint64()),
        ("picture", pa.uint64()),
        ("caption", pa.uint32()),  # its place among the sample's captions
        ("words", pa.string()),
        ("text_id", pa.uint64()),
        ("num_words", pa.uint32()),
    ]
)
GRAMS: Final = pa.schema([("gram", pa.uint64()), ("count", pa.uint64())])


@dataclass(frozen=True)
class Extracted:
    """The files with the rows and the counts of a shard."""

    shard: str
    rows: Path
    grams: Path

    @property
    def name(self) -> str:
        """The name of the shard in its present state."""
        return self.rows.stem


@dataclass(frozen=True)
class ExtractJob:
    """A shard, and the folder that its files go to."""

    shard: str
    work: Path

    def target(self) -> Extracted:
        """The files of the shard in its present state, once they are written."""
        name = f"{hash64(f'{FORMAT}|{self.shard}|{shard_state(self.shard)}'.encode('utf-8', 'surrogatepass')):016x}"
        return Extracted(self.shard, self.work / "rows" / f"{name}.parquet", self.work / "grams" / f"{name}.parquet")


def extract(job: ExtractJob) -> Extracted:
    """Read a shard and write its files; what an earlier call wrote of the same shard is left as it is.

    Raises:
        UserError: the shard cannot be read, or is no tar.
    """
    target = job.target()
    if target.rows.exists():
        return target
    rows: list[dict[str, Any]] = []
    with OpenShard(job.shard) as shard:
        for sample in shard:
            rows += _sample_rows(sample)
        lost = (finding for finding in shard.findings if finding.kind != REPEATED_MEMBER)
        rows += (
            {"sample": place, "key": _shown(finding.key), "unusable": finding.kind}
            for place, finding in enumerate(lost, len(shard))
        )
    counts = Counter(gram for row in rows if row.get("words") for gram in grams(row["words"]))
    counted = {"gram": gram_ids(list(counts)), "count": list(counts.values())}
    write_table(pa.table(counted, GRAMS), target.grams)
    write_table(_table(rows), target.rows)  # last: where it is, the other one is too
    return target


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file, whole or not at all."""
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_bytes(path, content.getvalue())


def _sample_rows(sample: StoredSample) -> list[dict[str, Any]]:
    """A row for each caption; a single one without caption when the sample cannot be used."""
    row: dict[str, Any] = {"sample": sample.position, "key": _shown(sample.key)}
    try:
        stored = sample.image()
        picture = picture_info(stored)
        fields = sample.fields()
        captions = sample.captions(fields)
    except FindingError as error:
        return [{**row, "unusable": error.finding.kind}]
    except (BadSampleError, OSError):
        return [{**row, "unusable": UNDECODABLE_IMAGE}]
    if not captions:
        return [{**row, "unusable": NO_CAPTION}]
    url = fields.get("url")
    row["width"], row["height"] = picture.width, picture.height
    row["file_id"] = hash64(stored)
    row["url_id"] = hash64(url.encode("utf-8", "surrogatepass")) if isinstance(url, str) and url else None
    row["picture"] = None if picture.hash == NO_HASH else picture.hash
    return [{**row, "caption": place, **_text(caption)} for place, caption in enumerate(captions)]


def _text(caption: str) -> dict[str, Any]:
    words = normal_form(caption)
    return {"words": words, "text_id": hash64(words.encode("utf-8")), "num_words": len(words.split())}


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), ROWS)


def _shown(key: str) -> str:
    """The key as UTF-8 can hold it: names in a tar may be any bytes."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
