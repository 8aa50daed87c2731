"""Every sample of a shard judged by its captions and by what was detected in its picture, a part at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data.check.samples import FindingError, OpenShard, StoredSample
from data.convert.on_ranks import LeftOut
from data.counterfactuals.numbers import WORDS, only_number
from data.counting.entries import in_order
from data.counting.named import NamedNumber, Outcome, named_number
from data.counting.sample import counting_json
from data.counting.source import Candidate, CountSource, verdict
from data.counting.tally import CAPTIONS, SAMPLES, UNKNOWN, Tally, add
from data.images.picture import Picture
from data.samples.bad_sample import BadSampleError
from data.shards.tar import NoTarError
from vlm.errors import UserError, reason


@dataclass(frozen=True)
class Agreed:
    """A sample in whose picture as many objects were found as its captions say, before small numbers are made rarer.

    `position` is its place in the shard, `places` are those of the captions that name the number; `entry` is that of
    its detections in their file.
    """

    position: int
    key: str
    number: int
    places: tuple[int, ...]
    entry: int | None


@dataclass(frozen=True)
class Part:
    """Part `part` of the `parts` of a shard in some state; the first one also has what its captions alone decide.

    `matched` are the entries of the detections' file that name samples of the shard; `detected` are the keys of those
    at whose pictures somebody looked, and the counts of their classes.
    """

    shard: int
    state: str
    part: int
    parts: int
    tally: Tally
    matched: tuple[int, ...]
    agreed: tuple[Agreed, ...]
    left_out: tuple[LeftOut, ...]
    detected: tuple[tuple[str, dict[str, int]], ...] = ()


@dataclass(frozen=True)
class JudgeJob:
    """A shard: its number among all, its name, the state that it is in, and the parts that are done."""

    number: int
    name: str
    state: str
    done: frozenset[int]


@dataclass
class _Found:
    """The findings of one part."""

    tally: Tally = field(default_factory=dict)
    matched: list[int] = field(default_factory=list)
    agreed: list[Agreed] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    detected: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    def unusable(self, word: str, key: str, why: str) -> None:
        add(self.tally, word, Outcome.UNUSABLE)
        self.left_out.append(LeftOut(shown_key(key), why))


def judge(job: JudgeJob, source: CountSource) -> Iterator[Part]:
    """The parts of a shard that are not done.

    What is no tar has one empty part; in a damaged shard the samples before the damage are judged.

    Raises:
        UserError: the shard cannot be read.
    """
    found = _Found()
    try:
        with OpenShard(job.name) as shard:
            found.left_out += [LeftOut(shown_key(finding.key), finding.reason) for finding in shard.findings]
            candidates = [one for sample in shard if (one := _candidate(sample, source, found)) is not None]
            size = source.together or max(1, len(candidates))
            groups = [candidates[start : start + size] for start in range(0, len(candidates) or 1, size)]
            for place, group in enumerate(groups):
                if place not in job.done:
                    _compare(group, source, found)
                    yield _part(job, place, len(groups), found)
                found = _Found()
    except NoTarError as error:
        found.left_out.append(LeftOut("", str(error)))
        yield _part(job, 0, 1, found)
    except OSError as error:
        raise UserError(f"{error.filename or job.name}: {error.strerror or reason(error)}") from error


def _candidate(sample: StoredSample, source: CountSource, found: _Found) -> Candidate | None:
    """The sample, where its captions name one number."""
    add(found.tally, "", SAMPLES)
    try:
        fields = sample.fields()
        entry = source.entry(sample.key, fields)
        if entry is not None:
            found.matched.append(entry)
        captions = sample.captions(fields)
    except FindingError as error:
        found.unusable("", sample.key, str(error))
        return None
    for caption in captions:
        if (word := only_number(caption)) is not None:
            add(found.tally, WORDS[word.value], CAPTIONS)
    named = named_number(captions)
    if isinstance(named, NamedNumber):
        add(found.tally, WORDS[named.value], SAMPLES)
        return Candidate(sample, fields, captions, named, entry)
    add(found.tally, "", named)
    return None


def _compare(candidates: Sequence[Candidate], source: CountSource, found: _Found) -> None:
    for one, counts in zip(candidates, source.counts(candidates), strict=True):
        word = WORDS[one.named.value]
        if isinstance(counts, str):
            found.unusable(word, one.sample.key, counts)
            continue
        if counts is None:
            add(found.tally, word, UNKNOWN)
        if isinstance(counts, dict):
            found.detected.append((shown_key(one.sample.key), counts))
            counts = in_order(counts.values())
        outcome = verdict(one.named.value, counts)
        if outcome != Outcome.KEPT:
            add(found.tally, word, outcome)
        elif why := _refusal(one):
            found.unusable(word, one.sample.key, why)
        else:
            number, places = one.named.value, one.named.places
            found.agreed.append(Agreed(one.sample.position, shown_key(one.sample.key), number, places, one.entry))


def _refusal(one: Candidate) -> str | None:
    """Why the sample cannot be trained on."""
    try:
        Picture(one.sample.image()).check()
        counting_json(one.fields, one.captions, one.named)
    except (FindingError, BadSampleError) as error:
        return str(error)
    return None


def shown_key(key: str) -> str:
    """A key as UTF-8 can hold it: names in a tar may be any bytes."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _part(job: JudgeJob, place: int, parts: int, found: _Found) -> Part:
    return Part(
        shard=job.number,
        state=job.state,
        part=place,
        parts=parts,
        tally=found.tally,
        matched=tuple(found.matched),
        agreed=tuple(found.agreed),
        left_out=tuple(found.left_out),
        detected=tuple(found.detected),
    )
