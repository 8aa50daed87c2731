"""From a folder of embeddings to a folder of neighbours: clusters, over stages, and groups within them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.embeddings.embedded import EmbeddingsManifest, What, read_vectors, require_kind
from data.embeddings.parts import PartRecord, PartsFolder, manifest_text, part_record, parts_identity, write_part
from data.neighbours.groups import NO_GROUP, group_neighbours
from data.neighbours.kmeans import Vectors, fit_centres, nearest_centres
from data.neighbours.labels import (
    FORMAT,
    MOST_CLUSTERS,
    NEIGHBOURS,
    NONE,
    NeighboursManifest,
    label_columns,
    read_labels,
)
from vlm.aside import folder_aside
from vlm.atomic import write_text
from vlm.errors import UserError, reason
from vlm.paths import below

_SCRATCH = ".vectors"
_GROUPS = 65_536


@dataclass(frozen=True)
class ClusterJob:
    """Embeddings of kind `on`, to be put into so many clusters; with `group_size`, also into groups of that many.

    `previous` are the labels of the stage before, whose clusters are divided.
    """

    embeddings: PartsFolder[EmbeddingsManifest]
    on: What
    clusters: int
    out: Path
    seed: int = 0
    previous: PartsFolder[NeighboursManifest] | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class ClusterSummary:
    """The outcome: samples, sizes of the clusters that are not empty, groups, the mean cosine of two of a group.

    `left_out` samples have no label of the stage before.
    """

    num_samples: int
    sizes: NDArray[np.int64]
    num_groups: int
    similarity: float
    left_out: int


class _Loaded(NamedTuple):
    """Vectors of all samples in a scratch file, their rows in their shards, and their clusters of the stage before.

    Those of part p are at `ends[p - 1]` to `ends[p]`.
    """

    vectors: Vectors
    rows: NDArray[np.int32]
    before: NDArray[np.int32]
    ends: tuple[int, ...]
    left_out: int


def cluster(job: ClusterJob, report: Callable[[int, int], None] = lambda _done, _total: None) -> ClusterSummary:
    """Write the folder, whole or not at all; the same embeddings and options as the same bytes, on one machine.

    Memory grows with the samples (a row and labels of each) and with the largest cluster, whose vectors are held for
    groups; the vectors of all lie in a scratch file meanwhile. `report` is called with the number of parts that were
    read, and of all.

    Raises:
        UserError: embeddings of another kind, labels of other samples, too many clusters, or a damaged part.
    """
    manifest = _manifest(job)
    try:
        with folder_aside(job.out) as aside:
            loaded = _load(job, aside / _SCRATCH, report)
            if len(loaded.vectors) < job.clusters:
                found = f"{job.embeddings.folder} has {len(loaded.vectors):,} samples with a vector"
                raise UserError(f"--clusters: {job.clusters:,} are more than there are samples: {found}")
            nearest = nearest_centres(loaded.vectors, fit_centres(loaded.vectors, job.clusters, job.seed))
            labels = (loaded.before.astype(np.int64) * job.clusters + nearest).astype(np.int32)
            groups = None if job.group_size is None else _groups(loaded.vectors, labels, job.group_size)
            similarity = 0.0 if groups is None else _similarity(loaded.vectors, groups)
            num_groups = 0 if groups is None else int(groups.max()) + 1
            parts = tuple(_write_parts(job, aside, loaded, labels, groups))
            (aside / _SCRATCH).unlink()
            written = manifest.model_copy(update={"parts": parts, "num_groups": num_groups})
            write_text(aside / NEIGHBOURS.file, manifest_text(written))
    except OSError as error:
        raise UserError(f"{error.filename or job.out}: {error.strerror or reason(error)}") from error
    sizes = np.unique(labels, return_counts=True)[1]
    return ClusterSummary(len(labels), sizes, num_groups, similarity, loaded.left_out)


def _manifest(job: ClusterJob) -> NeighboursManifest:
    """The manifest but for what is found out. Raises UserError where the job cannot be."""
    require_kind(job.embeddings, job.on, "--on")
    before = None if job.previous is None else job.previous.manifest
    num_clusters = job.clusters * (1 if before is None else before.num_clusters)
    if num_clusters > MOST_CLUSTERS:
        raise UserError(
            f"--clusters: {job.clusters:,} in each of {num_clusters // job.clusters:,} clusters of the stage before "
            f"are more than {MOST_CLUSTERS:,} in all"
        )
    return NeighboursManifest(
        format=FORMAT,
        parts=(),
        model=job.embeddings.manifest.model,
        on=job.on,
        seed=job.seed,
        clusters=job.clusters,
        stages=1 if before is None else before.stages + 1,
        num_clusters=num_clusters,
        previous="" if before is None else parts_identity(before.parts),
        group_size=job.group_size,
    )


def _load(job: ClusterJob, scratch: Path, report: Callable[[int, int], None]) -> _Loaded:
    """All vectors of samples that have a label of the stage before."""
    records, width = job.embeddings.manifest.parts, job.embeddings.manifest.dims[job.on]
    of_before: Sequence[PartRecord | None] = [None] * len(records)
    if job.previous is not None:
        of_before = job.previous.of_shards([record.holds for record in records], "--stages")
    rows, before, ends, left_out = list[NDArray[np.int32]](), list[NDArray[np.int32]](), list[int](), 0
    with scratch.open("wb") as file:
        for number, (record, earlier) in enumerate(zip(records, of_before, strict=True)):
            report(number, len(records))
            found, vectors = read_vectors(job.embeddings, record, job.on)
            labels = np.zeros(len(found), np.int32)
            if job.previous is not None and earlier is not None:
                known = np.full(record.num_rows, NONE, np.int32)
                clusters = read_labels(job.previous, earlier, groups=False).clusters[: record.num_rows]
                known[: len(clusters)] = clusters
                labels = known[found]
            usable = labels != NONE
            file.write(np.ascontiguousarray(vectors[usable].astype(job.embeddings.manifest.stored)).tobytes())
            rows.append(found[usable])
            before.append(labels[usable])
            ends.append((ends[-1] if ends else 0) + int(usable.sum()))
            left_out += int((~usable).sum())
    report(len(records), len(records))
    total = ends[-1] if ends else 0
    shape, stored = (total, width), np.dtype(job.embeddings.manifest.stored)
    vectors_of_all = np.memmap(scratch, stored, "r", shape=shape) if total else np.zeros(shape, stored)
    nothing = np.zeros(0, np.int32)
    return _Loaded(
        vectors_of_all, np.concatenate([nothing, *rows]), np.concatenate([nothing, *before]), tuple(ends), left_out
    )


def _groups(vectors: Vectors, labels: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """The group of each sample: full ones within a cluster, then of what is left of all; the last may be smaller."""
    groups = np.full(len(labels), NO_GROUP, np.int64)
    places = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[places], prepend=NONE))
    done = 0
    for of_cluster in [*np.split(places, starts[1:]), None]:
        members = np.flatnonzero(groups == NO_GROUP) if of_cluster is None else of_cluster
        found = group_neighbours(np.asarray(vectors[members], np.float32), size)
        groups[members] = np.where(found == NO_GROUP, NO_GROUP, found + done)
        done += int(found.max(initial=NO_GROUP)) + 1
    groups[groups == NO_GROUP] = done
    return groups.astype(np.int32)


def _similarity(vectors: Vectors, groups: NDArray[np.int32]) -> float:
    """The mean cosine of two samples of one group: over all groups, (|sum|^2 - sum of |.|^2) / (n (n - 1))."""
    places = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups))
    total, pairs = 0.0, 0
    for start in range(0, len(ends), _GROUPS):
        stops = ends[start : start + _GROUPS]
        first = int(ends[start - 1]) if start else 0
        rows = np.asarray(vectors[places[first : stops[-1]]], np.float64)
        begins = np.concatenate([[first], stops[:-1]]) - first
        sums, counts = np.add.reduceat(rows, begins), stops - first - begins
        squares = np.add.reduceat(np.einsum("nd,nd->n", rows, rows), begins)
        total += float((np.einsum("nd,nd->n", sums, sums) - squares).sum())
        pairs += int((counts * (counts - 1)).sum())
    return total / max(1, pairs)


def _write_parts(
    job: ClusterJob, aside: Path, loaded: _Loaded, labels: NDArray[np.int32], groups: NDArray[np.int32] | None
) -> Iterator[PartRecord]:
    start = 0
    for record, stop in zip(job.embeddings.manifest.parts, loaded.ends, strict=True):
        here = slice(start, stop)
        columns = label_columns(loaded.rows[here], labels[here], None if groups is None else groups[here])
        stored = write_part(below(aside, record.file, "--embeddings"), columns)
        yield part_record(record.holds, record.file, sha256(stored).hexdigest())
        start = stop
