"""Copies of shards with the samples of the counting set that they hold."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.check.samples import FindingError, OpenShard
from data.counting.judge import Agreed
from data.counting.named import NamedNumber
from data.counting.sample import add_counted
from data.shards.tar_writing import tar_aside
from vlm.errors import UserError, reason


@dataclass(frozen=True)
class CopyJob:
    """A shard by number and name, its samples that are kept, and where they go."""

    shard: int
    name: str
    kept: tuple[Agreed, ...]
    path: Path


@dataclass(frozen=True)
class Copy:
    """A copy that was written: of which shard, a name for the samples in it, and its size."""

    shard: int
    content: str
    num_bytes: int


def content_of(kept: Sequence[Agreed]) -> str:
    """A name for these samples of a shard, with the captions that they keep."""
    texts = (f"{one.position} {one.number} {one.places}" for one in kept)
    return hashlib.blake2b("|".join(texts).encode(), digest_size=8).hexdigest()


def write_copy(job: CopyJob) -> Copy:
    """Write the kept samples of a shard in their stored order, whole or not at all; the same make the same file.

    Raises:
        UserError: the shard cannot be read, or its copy not be written.
    """
    kept = {one.position: NamedNumber(one.number, one.places) for one in job.kept}
    try:
        with OpenShard(job.name) as shard, tar_aside(job.path) as tar:
            for sample in shard:
                if sample.position in kept:
                    add_counted(tar, sample, kept[sample.position])
    except FindingError as error:
        raise UserError(f"{job.name}: has changed since it was read: {error}") from error
    except OSError as error:
        raise UserError(f"{error.filename or job.path}: {error.strerror or reason(error)}") from error
    return Copy(job.shard, content_of(job.kept), job.path.stat().st_size)
