"""Pass 2: how many images each text has, how many texts each image has, how often each unigram and bigram occurs.

All three are group-bys over 64-bit names. They are done one part of the names at a time, so that what is in memory at
once stays bounded however many rows there are; each part is one streaming query of polars.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.check.samples import hash64
from data.filter.extract import FORMAT, Extracted
from data.filter.rules import ImageIdentity
from vlm.aside import folder_aside, remove_files
from vlm.atomic import flush_to_disk, write_text
from vlm.errors import UserError

SETTINGS: Final = "counts.json"
_FILES: Final = rf"(texts|images|grams)-\d{{4}}\.parquet|{re.escape(SETTINGS)}"
_PARTITION_ROWS = 16_000_000  # 1.5 GB of memory
_IDENTITIES: Final[dict[ImageIdentity, pl.Expr]] = {
    "bytes": pl.col("file_id"),
    "url": pl.coalesce("url_id", "file_id"),
    "picture": pl.coalesce("picture", "file_id"),
}


def image_id(identity: ImageIdentity) -> pl.Expr:
    """The image of a row: its file's hash, or its url's or its picture's where it has one."""
    return _IDENTITIES[identity]


@dataclass(frozen=True)
class Counts:
    """Counts in a folder: `texts` (text, images), `images` (image, texts) and `grams` (gram, count), each in parts."""

    folder: Path

    def texts(self) -> pl.LazyFrame:
        """Columns `text` and `images`: different images that have the text."""
        return pl.scan_parquet(self.folder / "texts-*.parquet")

    def images(self) -> pl.LazyFrame:
        """Columns `image` and `texts`: different texts that the image has."""
        return pl.scan_parquet(self.folder / "images-*.parquet")

    def grams(self) -> pl.LazyFrame:
        """Columns `gram` and `count`: occurrences of a unigram or bigram, equal texts counted each time."""
        return pl.scan_parquet(self.folder / "grams-*.parquet")

    def shared_texts(self, max_images: int) -> NDArray[np.uint64]:
        """The texts that more than `max_images` images have, in ascending order."""
        return _sorted_ids(self.texts().filter(pl.col("images") > max_images), "text")

    def crowded_images(self, max_texts: int) -> NDArray[np.uint64]:
        """The images that have more than `max_texts` texts, in ascending order."""
        return _sorted_ids(self.images().filter(pl.col("texts") > max_texts), "image")

    def frequent_grams(self, max_ngrams: int, min_count: int) -> NDArray[np.uint64]:
        """The `max_ngrams` most frequent unigrams and bigrams and all as frequent as the last; none below `min_count`.

        In ascending order.
        """
        by_count = self.grams().group_by("count").agg(pl.len().alias("grams")).collect(engine="streaming")
        ranked = by_count.sort("count", descending=True).with_columns(pl.col("grams").cum_sum())
        last = ranked.filter(pl.col("grams") >= max_ngrams)
        least = max(min_count, last["count"][0] if len(last) else 1)
        return _sorted_ids(self.grams().filter(pl.col("count") >= least), "gram")


def count(
    extracted: Sequence[Extracted], folder: Path, identity: ImageIdentity, partition_rows: int = _PARTITION_ROWS
) -> Counts:
    """Count over the rows of all shards into `folder`, which appears when all is counted; counts there are replaced.

    Counts that `folder` already holds of the same shards and identity are taken as they are. `partition_rows`
    bounds the rows that a query groups at once.
    """
    signature = _signature(extracted, identity)
    if _settings(folder) == signature:
        return Counts(folder)
    _require_ours(folder)
    with folder_aside(folder) as aside:
        _count(extracted, aside, identity, partition_rows)
        write_text(aside / SETTINGS, json.dumps(signature, indent=1) + "\n")
        remove_files(folder, _FILES)
    return Counts(folder)


def _require_ours(folder: Path) -> None:
    """A check that a folder to be replaced holds counts: somebody may have one of his own under this name."""
    others = [entry for entry in folder.iterdir() if not re.fullmatch(_FILES, entry.name)] if folder.is_dir() else []
    if others:
        raise UserError(f"{folder}: holds files that are no counts ({others[0].name}); name another folder by --work")


def _count(extracted: Sequence[Extracted], aside: Path, identity: ImageIdentity, partition_rows: int) -> None:
    rows = pl.scan_parquet([one.rows for one in extracted]).filter(pl.col("unusable").is_null())
    pairs = rows.select(text="text_id", image=image_id(identity))
    grams = pl.scan_parquet([one.grams for one in extracted])
    num_pairs = sum(pq.read_metadata(one.rows).num_rows for one in extracted)
    num_grams = sum(pq.read_metadata(one.grams).num_rows for one in extracted)
    for partition, inside in _partitions("text", num_pairs, partition_rows):
        counts = pairs.filter(inside).unique().group_by("text").agg(pl.len().alias("images"))
        counts.sort("text").sink_parquet(aside / f"texts-{partition:04d}.parquet", engine="streaming")
    for partition, inside in _partitions("image", num_pairs, partition_rows):
        counts = pairs.filter(inside).unique().group_by("image").agg(pl.len().alias("texts"))
        counts.sort("image").sink_parquet(aside / f"images-{partition:04d}.parquet", engine="streaming")
    for partition, inside in _partitions("gram", num_grams, partition_rows):
        summed = grams.filter(inside).group_by("gram").agg(pl.col("count").sum())
        summed.sort("gram").sink_parquet(aside / f"grams-{partition:04d}.parquet", engine="streaming")
    for file in aside.iterdir():
        flush_to_disk(file)


def saved_counts(folder: Path, identity: ImageIdentity) -> Counts:
    """Counts that an earlier run saved.

    Raises:
        UserError: there are none, or they were made for another kind of image identity or by another version.
    """
    settings = _settings(folder)
    if settings is None:
        raise UserError(f"--counts: {folder} holds no counts ({SETTINGS} cannot be read)")
    if settings.get("format") != FORMAT:
        raise UserError(f"--counts: {folder} was counted by another version of this program")
    if settings.get("image_identity") != identity:
        raise UserError(f"--counts: {folder} tells images apart by {settings.get('image_identity')}, not by {identity}")
    return Counts(folder)


def _settings(folder: Path) -> dict[str, object] | None:
    """The settings that a folder of counts was made with; None where there are none, or they are damaged."""
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _partitions(column: str, num_rows: int, partition_rows: int) -> list[tuple[int, pl.Expr]]:
    """The filters that cut the names in `column` into partitions of about `partition_rows` rows."""
    num_partitions = max(1, -(-num_rows // partition_rows))
    return [(partition, pl.col(column) % num_partitions == partition) for partition in range(num_partitions)]


def _sorted_ids(table: pl.LazyFrame, column: str) -> NDArray[np.uint64]:
    return np.sort(table.select(column).collect(engine="streaming")[column].to_numpy()).astype(np.uint64, copy=False)


def _signature(extracted: Sequence[Extracted], identity: ImageIdentity) -> dict[str, object]:
    names = "|".join(sorted(one.name for one in extracted))
    return {"format": FORMAT, "image_identity": identity, "shards": f"{hash64(names.encode()):016x}"}
