"""The scan of one whole shard, with all that the report needs: three 64-bit hashes a sample, and tallies."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.check.histogram import Histogram
from data.check.picture import NO_HASH, PictureInfo, picture_info
from data.check.samples import (
    DAMAGED_SHARD,
    UNDECODABLE_IMAGE,
    UNREADABLE_SHARD,
    UNSAFE_MEMBER,
    Finding,
    FindingError,
    OpenShard,
    StoredSample,
    hash64,
)
from data.samples.bad_sample import BadSampleError
from vlm.errors import UserError

DISTRIBUTIONS = (
    "image_width_px",
    "image_height_px",
    "image_aspect_thousandths",
    "image_bytes",
    "captions_per_sample",
    "caption_characters",
    "caption_words",
    "caption_clip_tokens",
)


@dataclass(frozen=True)
class ScanJob:
    """A shard to read; without `texts` for its images' hashes alone. At most `listed` findings of a kind are kept."""

    shard: str
    texts: bool = True
    clip_tokens: bool = False
    listed: int = 100


@dataclass(frozen=True)
class ShardScan:
    """The contents of one shard; row i of each hash array is its sample i.

    `num_entries` are its samples and what was refused or lost around them, `num_bad` those that cannot be used.
    """

    shard: str
    num_samples: int
    num_entries: int
    num_bad: int
    num_bytes: int
    tallies: dict[str, Counter[str]]
    histograms: dict[str, Histogram]
    image_hashes: NDArray[np.uint64]
    file_hashes: NDArray[np.uint64]
    key_hashes: NDArray[np.uint64]
    num_findings: Counter[str]
    findings: tuple[Finding, ...]


@dataclass
class _Notes:
    """Notes on the samples of a shard, taken while they are read."""

    tallies: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in ("suffixes", "formats", "modes")}
    )
    values: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in DISTRIBUTIONS})
    captions: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    num_bad: int = 0


def scan_shard(job: ScanJob) -> ShardScan:
    """Read every member that training would read; nothing found wrong ends the scan."""
    notes = _Notes()
    try:
        open_shard = OpenShard(job.shard)
    except UserError as error:
        notes.findings.append(Finding(UNREADABLE_SHARD, "", str(error).removeprefix("shards: ")))
        return _result(job, notes, np.zeros((0, 3), dtype=np.uint64), num_bytes=0)
    with open_shard as shard:
        hashes = np.full((len(shard), 3), NO_HASH, dtype=np.uint64)
        for sample in shard:
            before = len(notes.findings)
            _scan_sample(sample, notes, hashes[sample.position], job.texts)
            notes.num_bad += len(notes.findings) > before
    notes.findings.extend(shard.findings)
    if job.clip_tokens and notes.captions:
        from vlm.model.tokenizer import clip_token_counts  # brings torch and open_clip, which nothing else here needs

        notes.values["caption_clip_tokens"] = clip_token_counts(notes.captions).tolist()
    return _result(job, notes, hashes, num_bytes=shard.num_bytes)


def _scan_sample(sample: StoredSample, notes: _Notes, hashes: NDArray[np.uint64], texts: bool) -> None:
    """Note one sample; its row of `hashes` is image, file, key."""
    notes.tallies["suffixes"].update(sample.members.keys())
    hashes[2] = hash64(sample.key.encode("utf-8", "surrogatepass"))
    try:
        stored = sample.image()
        hashes[1] = hash64(stored)
        notes.values["image_bytes"].append(len(stored))
        picture = picture_info(stored)
        hashes[0] = picture.hash
        _note_picture(picture, notes)
    except FindingError as error:
        notes.findings.append(error.finding)
    except (BadSampleError, OSError) as error:
        notes.findings.append(Finding(UNDECODABLE_IMAGE, sample.key, str(error)))
    if texts:
        _note_texts(sample, notes)


def _note_picture(picture: PictureInfo, notes: _Notes) -> None:
    notes.tallies["formats"][picture.format] += 1
    notes.tallies["modes"][picture.mode] += 1
    notes.values["image_width_px"].append(picture.width)
    notes.values["image_height_px"].append(picture.height)
    notes.values["image_aspect_thousandths"].append(round(1000 * picture.width / picture.height))


def _note_texts(sample: StoredSample, notes: _Notes) -> None:
    try:
        sample.label()
        captions = sample.captions(sample.fields())
    except FindingError as error:
        notes.findings.append(error.finding)
        return
    notes.captions.extend(captions)
    notes.values["captions_per_sample"].append(len(captions))
    notes.values["caption_characters"].extend(map(len, captions))
    notes.values["caption_words"].extend(len(caption.split()) for caption in captions)


def _result(job: ScanJob, notes: _Notes, hashes: NDArray[np.uint64], num_bytes: int) -> ShardScan:
    kinds = Counter(finding.kind for finding in notes.findings)
    counts: Counter[str] = Counter()
    listed = []
    for finding in notes.findings:
        counts[finding.kind] += 1
        if counts[finding.kind] <= job.listed:
            listed.append(finding)
    # What the tar lost or refused is no sample of it, but counts as one that cannot be used.
    refused = {finding.key for finding in notes.findings if finding.kind == UNSAFE_MEMBER}
    around = len(refused) + kinds[DAMAGED_SHARD] + kinds[UNREADABLE_SHARD]
    return ShardScan(
        shard=job.shard,
        num_samples=len(hashes),
        num_entries=len(hashes) + around,
        num_bad=notes.num_bad + around,
        num_bytes=num_bytes,
        tallies=notes.tallies,
        histograms={name: Histogram(values) for name, values in notes.values.items()},
        image_hashes=hashes[:, 0].copy(),
        file_hashes=hashes[:, 1].copy(),
        key_hashes=hashes[:, 2].copy(),
        num_findings=kinds,
        findings=tuple(listed),
    )
