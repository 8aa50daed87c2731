"""One shard written anew, with a generated caption in each sample that can have one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tarfile import TarFile

from data.check.samples import FindingError, OpenShard, StoredSample
from data.convert.on_ranks import LeftOut, MadeOfShard
from data.generated.fields import CaptionField, GeneratedCaption, Origin
from data.samples.bad_sample import BadSampleError
from data.shards.tar import NoTarError
from data.shards.tar_writing import add_member, tar_aside
from vlm.errors import UserError, reason

Captioner = Callable[[Sequence[StoredSample]], Sequence[GeneratedCaption | str]]
"""The caption of each of some samples, or why it has none; all are within one group of a shard's samples in a row."""


@dataclass(frozen=True)
class CaptionJob:
    """A shard: its number among all, the state that it is in, where its copy goes, and what is written there.

    A caption whose cosine is below `min_score` is left out. `together` samples are captioned at a time.
    """

    number: int
    shard: str
    state: str
    path: Path
    field: CaptionField
    origin: Origin
    min_score: float | None
    together: int


@dataclass(frozen=True)
class CaptionedShard(MadeOfShard):
    """The outcome of one shard; `num_bytes` is 0 where no sample was there to be written, so that there is no file."""

    num_samples: int
    num_captions: int
    num_below: int


@dataclass
class _Counts:
    captions: int = 0
    below: int = 0
    left_out: list[LeftOut] = field(default_factory=list)


def caption_shard(job: CaptionJob, captions_of: Captioner) -> CaptionedShard:
    """Write the copy of a shard, whole or not at all: every member as it was, but for the json that gets a caption.

    What is no tar has no copy; in a damaged one the samples before the damage are written.

    Raises:
        UserError: the shard cannot be read, or its copy not be written.
    """
    counts = _Counts()
    try:
        with OpenShard(job.shard) as shard:
            counts.left_out += [LeftOut(finding.key, finding.reason) for finding in shard.findings]
            if not len(shard):
                return _result(job, 0, counts)
            with tar_aside(job.path) as tar:
                for samples in _in_groups(shard, job.together):
                    _write_group(samples, job, captions_of, counts, tar)
            return _result(job, len(shard), counts)
    except NoTarError as error:
        counts.left_out.append(LeftOut("", str(error)))
        return _result(job, 0, counts)
    except OSError as error:
        raise UserError(f"{error.filename or job.path}: {error.strerror or reason(error)}") from error


def _in_groups(shard: OpenShard, size: int) -> Iterator[list[StoredSample]]:
    samples = iter(shard)
    while group := list(islice(samples, size)):
        yield group


def _write_group(
    samples: Sequence[StoredSample], job: CaptionJob, captions_of: Captioner, counts: _Counts, tar: TarFile
) -> None:
    """Nothing is generated for a sample whose json cannot take it."""
    refusals = {sample.position: _refusal(sample, job.field) for sample in samples}
    usable = [sample for sample in samples if refusals[sample.position] is None]
    made = {sample.position: one for sample, one in zip(usable, captions_of(usable), strict=True)}
    for sample in samples:
        add_sample(tar, sample, _new_json(sample, refusals[sample.position] or made[sample.position], job, counts))


def add_sample(tar: TarFile, sample: StoredSample, new_json: bytes | None) -> None:
    """Add a sample as it is stored, but for its json where a new one is given."""
    for suffix in sample.members:
        stored = sample.read(suffix) if suffix != "json" or new_json is None else new_json
        add_member(tar, sample.key, suffix, stored)
    if new_json is not None and "json" not in sample.members:
        add_member(tar, sample.key, "json", new_json)


def _refusal(sample: StoredSample, name: CaptionField) -> str | None:
    """Why no caption can be added to the sample's json."""
    try:
        name.there(sample.fields())
    except (BadSampleError, FindingError) as error:
        return str(error)
    return None


def _new_json(sample: StoredSample, made: GeneratedCaption | str, job: CaptionJob, counts: _Counts) -> bytes | None:
    """The sample's json with its caption; None, counted, where it gets none."""
    if isinstance(made, str):
        counts.left_out.append(LeftOut(sample.key, made))
        return None
    if job.min_score is not None and made.cosine < job.min_score:
        counts.below += 1
        return None
    try:
        stored = job.field.added(sample.fields(), made, job.origin)
    except BadSampleError as error:  # it would be too long
        counts.left_out.append(LeftOut(sample.key, str(error)))
        return None
    counts.captions += 1
    return stored


def _result(job: CaptionJob, num_samples: int, counts: _Counts) -> CaptionedShard:
    if not num_samples:
        job.path.unlink(missing_ok=True)
    return CaptionedShard(
        number=job.number,
        state=job.state,
        num_samples=num_samples,
        num_captions=counts.captions,
        num_below=counts.below,
        num_bytes=job.path.stat().st_size if num_samples else 0,
        left_out=tuple(counts.left_out),
    )
