"""Folders of embeddings and of neighbours, written from arrays."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.embeddings.embedded import EMBEDDINGS, FORMAT, EmbeddedSamples, EmbeddingsManifest
from data.embeddings.parts import PartsFolder, manifest_text, open_parts, part_record, write_part
from data.neighbours import labels as neighbours
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.source import ShardContent, Source, open_source


def source_of(pattern: str, name: str = "pairs") -> Source:
    """The source of the shards that a pattern names."""
    return open_source(name, [pattern], FolderIndex(ShardCache(), "SHARDS"))


def contents_of(counts: Sequence[int]) -> list[ShardContent]:
    """Shards that are nowhere, with so many samples each."""
    return [ShardContent(f"{number}.tar", count, f"content {number}") for number, count in enumerate(counts)]


def write_embeddings(
    folder: Path,
    contents: Sequence[ShardContent],
    vectors: Sequence[NDArray[np.float64]],
    rows: Mapping[int, Sequence[int]] | None = None,
) -> PartsFolder[EmbeddingsManifest]:
    """Embeddings of images, brought to length 1, of the samples of each shard, or of those of its `rows` alone."""
    parts = []
    for number, (holds, rows_of_shard) in enumerate(zip(contents, vectors, strict=True)):
        here = np.asarray((rows or {}).get(number, range(len(rows_of_shard))), np.int32)
        unit = (rows_of_shard / np.linalg.norm(rows_of_shard, axis=1, keepdims=True)).astype(np.float32)
        samples = EmbeddedSamples(here, tuple(f"{row:06d}" for row in here.tolist()), unit[here], None, None)
        stored = write_part(folder / f"{number}.parquet", samples.columns("float32", "first"))
        parts.append(part_record(holds, f"{number}.parquet", sha256(stored).hexdigest()))
    dims = {"image": vectors[0].shape[1]}
    values = {"format": FORMAT, "parts": parts, "model": "m", "dims": dims, "texts": "first", "stored": "float32"}
    manifest = EmbeddingsManifest.model_validate({**values, "txt": "whole", "precision": "fp32"})
    (folder / EMBEDDINGS.file).write_text(manifest_text(manifest))
    return open_parts(folder, EMBEDDINGS, "EMBEDDINGS")


def write_text_embeddings(
    folder: Path,
    contents: Sequence[ShardContent],
    captions: Sequence[Mapping[int, Sequence[str]]],
    embed: Callable[[str], NDArray[np.float64]],
) -> None:
    """Embeddings of all captions of the samples of each shard that are listed, by row."""
    parts = []
    for number, holds in enumerate(contents):
        texts = [text for of_row in captions[number].values() for text in of_row]
        vectors = np.stack([embed(text) / np.linalg.norm(embed(text)) for text in texts]).astype(np.float32)
        rows = np.asarray(list(captions[number]), np.int32)
        counts = np.asarray([len(of_row) for of_row in captions[number].values()], np.int32)
        samples = EmbeddedSamples(rows, tuple(f"{row:06d}" for row in rows), None, vectors, counts)
        stored = write_part(folder / f"{number}.parquet", samples.columns("float32", "all"))
        parts.append(part_record(holds, f"{number}.parquet", sha256(stored).hexdigest()))
    values = {"format": FORMAT, "parts": parts, "model": "m", "dims": {"text": len(embed("a"))}, "texts": "all"}
    manifest = EmbeddingsManifest.model_validate({**values, "stored": "float32", "txt": "whole", "precision": "fp32"})
    (folder / EMBEDDINGS.file).write_text(manifest_text(manifest))


def write_neighbours(
    folder: Path,
    contents: Sequence[ShardContent],
    clusters: Sequence[NDArray[np.int64]],
    groups: Sequence[NDArray[np.int64]] | None = None,
    group_size: int | None = None,
) -> PartsFolder[neighbours.NeighboursManifest]:
    """The clusters, and groups, of all samples of each shard; -1 for one that has none."""
    parts = []
    for number, holds in enumerate(contents):
        rows = np.flatnonzero(clusters[number] >= 0).astype(np.int32)
        in_groups = None if groups is None else groups[number][rows].astype(np.int32)
        columns = neighbours.label_columns(rows, clusters[number][rows].astype(np.int32), in_groups)
        stored = write_part(folder / f"{number}.parquet", columns)
        parts.append(part_record(holds, f"{number}.parquet", sha256(stored).hexdigest()))
    num_clusters = 1 + max(int(one.max(initial=0)) for one in clusters)
    manifest = neighbours.NeighboursManifest(
        format=neighbours.FORMAT,
        parts=tuple(parts),
        model="m",
        on="image",
        seed=0,
        clusters=num_clusters,
        num_clusters=num_clusters,
        group_size=group_size,
        num_groups=0 if groups is None else 1 + max(int(one.max(initial=0)) for one in groups),
    )
    (folder / neighbours.NEIGHBOURS.file).write_text(manifest_text(manifest))
    return open_parts(folder, neighbours.NEIGHBOURS, "labels")
