"""The scan of one whole shard, with all that the report needs: a hash a sample, two a picture, and tallies."""

from collections import Counter
from collections.abc import Sequence
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
from data.shards.tar import kind_of_member
from vlm.errors import UserError

OF_DOCUMENTS = "images_per_document"
DISTRIBUTIONS = (
    "image_width_px",
    "image_height_px",
    "image_aspect_thousandths",
    "image_bytes",
    OF_DOCUMENTS,
    "captions_per_sample",
    "caption_characters",
    "caption_words",
    "caption_clip_tokens",
)


@dataclass(frozen=True)
class ScanJob:
    """A shard to read; without `texts` for its images' hashes alone. At most `listed` findings of a kind are kept.

    `mark` is the place of an image in the text of a document. Without `images` none is read or missed, as in training
    with `data.images: false`, to which a document is a sample like others.
    """

    shard: str
    texts: bool = True
    clip_tokens: bool = False
    listed: int = 100
    mark: str = "<image>"
    images: bool = True


@dataclass(frozen=True)
class ShardScan:
    """The contents of one shard; row i of `key_hashes` is its sample i, and row j of the others a picture of a sample.

    A sample without a picture has a row of hashes that are none. `picture_samples` are the samples of the rows.
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
    picture_samples: NDArray[np.int64]
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
    keys: list[int] = field(default_factory=list)
    pictures: list[tuple[int, int, int]] = field(default_factory=list)  # sample, hash of the picture, of the file
    num_bad: int = 0


def scan_shard(job: ScanJob) -> ShardScan:
    """Read every member that training would read; nothing found wrong ends the scan."""
    notes = _Notes()
    try:
        open_shard = OpenShard(job.shard)
    except UserError as error:
        notes.findings.append(Finding(UNREADABLE_SHARD, "", str(error).removeprefix("shards: ")))
        return _result(job, notes, num_bytes=0)
    with open_shard as shard:
        for sample in shard:
            before = len(notes.findings)
            _scan_sample(sample, notes, job)
            notes.num_bad += len(notes.findings) > before
    notes.findings.extend(shard.findings)
    if job.clip_tokens and notes.captions:
        from vlm.model.tokenizer import clip_token_counts  # brings torch and open_clip, which nothing else here needs

        notes.values["caption_clip_tokens"] = clip_token_counts(notes.captions).tolist()
    return _result(job, notes, num_bytes=shard.num_bytes)


def _scan_sample(sample: StoredSample, notes: _Notes, job: ScanJob) -> None:
    """Note one sample, and each of its pictures."""
    in_document = dict.fromkeys(sample.in_document)
    kinds = (kind_of_member(suffix) if suffix in in_document else suffix for suffix in sample.members)
    notes.tallies["suffixes"].update(kinds)
    notes.keys.append(hash64(sample.key.encode("utf-8", "surrogatepass")))
    for suffix in (in_document or (None,)) if job.images else ():
        notes.pictures.append((sample.position, *_picture_hashes(sample, suffix, notes)))
    if job.texts and job.images and in_document:
        _note_document(sample, notes, job.mark)
    elif job.texts:
        _note_texts(sample, notes, alone=not job.images)


def _picture_hashes(sample: StoredSample, suffix: str | None, notes: _Notes) -> tuple[int, int]:
    """The hash of a picture and of its file, `NO_HASH` where there is none; None is the image of a pair."""
    hash_of_file = NO_HASH
    try:
        stored = sample.image() if suffix is None else sample.document_image(suffix)
        hash_of_file = hash64(stored)
        notes.values["image_bytes"].append(len(stored))
        picture = picture_info(stored)
        _note_picture(picture, notes)
    except FindingError as error:
        notes.findings.append(error.finding)
    except (BadSampleError, OSError) as error:
        notes.findings.append(Finding(UNDECODABLE_IMAGE, sample.key, str(error)))
    else:
        return picture.hash, hash_of_file
    return NO_HASH, hash_of_file


def _note_document(sample: StoredSample, notes: _Notes, mark: str) -> None:
    """Note the texts of a document, as one caption."""
    notes.values[OF_DOCUMENTS].append(len(sample.in_document))
    try:
        text = sample.document_text(mark)
    except FindingError as error:
        notes.findings.append(error.finding)
        return
    _note_captions((text,), notes)


def _note_picture(picture: PictureInfo, notes: _Notes) -> None:
    notes.tallies["formats"][picture.format] += 1
    notes.tallies["modes"][picture.mode] += 1
    notes.values["image_width_px"].append(picture.width)
    notes.values["image_height_px"].append(picture.height)
    notes.values["image_aspect_thousandths"].append(round(1000 * picture.width / picture.height))


def _note_texts(sample: StoredSample, notes: _Notes, *, alone: bool) -> None:
    """Note the captions of a sample; where they are used `alone`, a class is not enough."""
    try:
        sample.label()
        captions = sample.captions(sample.fields(), needed=alone)
    except FindingError as error:
        notes.findings.append(error.finding)
        return
    _note_captions(captions, notes)


def _note_captions(captions: Sequence[str], notes: _Notes) -> None:
    notes.captions.extend(captions)
    notes.values["captions_per_sample"].append(len(captions))
    notes.values["caption_characters"].extend(map(len, captions))
    notes.values["caption_words"].extend(len(caption.split()) for caption in captions)


def _result(job: ScanJob, notes: _Notes, num_bytes: int) -> ShardScan:
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
        num_samples=len(notes.keys),
        num_entries=len(notes.keys) + around,
        num_bad=notes.num_bad + around,
        num_bytes=num_bytes,
        tallies=notes.tallies,
        histograms={name: Histogram(values) for name, values in notes.values.items()},
        image_hashes=np.array([picture for _, picture, _ in notes.pictures], dtype=np.uint64),
        file_hashes=np.array([file for _, _, file in notes.pictures], dtype=np.uint64),
        key_hashes=np.array(notes.keys, dtype=np.uint64),
        picture_samples=np.array([sample for sample, _, _ in notes.pictures], dtype=np.int64),
        num_findings=kinds,
        findings=tuple(listed),
    )
