"""A folder of shards with generated captions: the same bytes from any number of ranks, and through any kill."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from data.check.samples import FindingError, OpenShard, StoredSample, shard_state
from data.convert.indexing import index_folder, index_shard
from data.convert.journal import Journal, JournalKind, open_journal
from data.generated.fields import CaptionField, GeneratedCaption, Origin
from data.generated.shard import CaptionedShard, Captioner, CaptionJob, LeftOut, caption_shard
from vlm.atomic import write_text
from vlm.distributed.world import World
from vlm.errors import UserError, reason

JOURNAL: Final = "caption-journal.jsonl"
LEDGER: Final = "caption-ledger.jsonl"
CAPTIONING: Final = JournalKind(JOURNAL, CaptionedShard, "captioning", "writing captions")
_WHERE: Final = "vlm caption"


@dataclass(frozen=True)
class CaptionSummary:
    """The result of all shards, by their numbers: samples, captions, those below the score, and who got none."""

    shards: Mapping[int, CaptionedShard]

    @property
    def num_samples(self) -> int:
        """Samples that were written."""
        return sum(one.num_samples for one in self.shards.values())

    @property
    def num_captions(self) -> int:
        """Samples that got a caption."""
        return sum(one.num_captions for one in self.shards.values())

    @property
    def num_below(self) -> int:
        """Captions that were left out for their score."""
        return sum(one.num_below for one in self.shards.values())

    @property
    def left_out(self) -> list[tuple[int, LeftOut]]:
        """What got no caption, or is no sample or shard at all, with the number of its shard."""
        return [(number, one) for number, shard in sorted(self.shards.items()) for one in shard.left_out]

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason was given, the most frequent first."""
        return dict(Counter(one.reason for _, one in self.left_out).most_common())


@dataclass(frozen=True)
class CaptionFolder:
    """The copies in `out` of shards, `names` telling for each its copy's path below it, and what they get.

    `together` samples are captioned at a time; no byte depends on it.
    """

    names: Mapping[str, str]
    out: Path
    field: CaptionField
    origin: Origin
    min_score: float | None
    together: int

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The shards by number."""
        return tuple(self.names)

    def path(self, number: int) -> Path:
        """The copy of a shard."""
        return self.out / self.names[self.shards[number]]

    def plan(self) -> dict[str, Any]:
        """All that the bytes depend on but the shards' contents, by which the folder is known again."""
        listed = hashlib.blake2b("|".join(self.names.values()).encode("utf-8", "surrogateescape"), digest_size=4)
        return {
            "format": 1,
            **self.origin.to_json(),
            "field": self.field.name,
            "min_score": self.min_score,
            "shards": f"{len(self.names)} ({listed.hexdigest()})",
        }

    def job(self, number: int, state: str) -> CaptionJob:
        """The work on one shard."""
        return CaptionJob(
            number=number,
            shard=self.shards[number],
            state=state,
            path=self.path(number),
            field=self.field,
            origin=self.origin,
            min_score=self.min_score,
            together=self.together,
        )

    def captions(self) -> Iterator[tuple[str, GeneratedCaption]]:
        """The captions that were written, shard by shard: name of the copy and key, caption. Raises UserError."""
        for number, name in enumerate(self.names.values()):
            if self.path(number).exists():
                with OpenShard(str(self.path(number))) as shard:
                    made = ((sample.key, self._caption_in(sample)) for sample in shard)
                    yield from ((f"{name}/{key}", caption) for key, caption in made if caption is not None)

    def _caption_in(self, sample: StoredSample) -> GeneratedCaption | None:
        try:
            return self.field.found(sample.fields(), self.origin)
        except FindingError:
            return None


def write_captions(
    folder: CaptionFolder,
    captions_of: Captioner,
    world: World,
    report: Callable[[int, int], None] = lambda _done, _total: None,
) -> CaptionSummary:
    """Write what is missing, whole shards on each rank, then index the folder. Collective.

    Called again after a kill, it goes on from the finished shards; called again at the end, it does nothing. `report`
    is called with the number of shards that are done, and of all.

    Raises:
        UserError: the folder holds something else, a shard that is done has changed since, or one cannot be read.
    """
    # As rank 0 sees them, also where each machine has a copy of its own.
    found = [shard_state(shard) for shard in folder.shards] if world.is_main else []
    states: list[str] = world.gather_objects(found)[0]
    with _journal(folder, world) as journal:
        finished = {} if journal is None else _finished(folder, journal, states)
        results: dict[int, CaptionedShard] = world.gather_objects(finished)[0]
        missing = [number for number in range(len(states)) if number not in results]
        for start in range(0, len(missing), world.size):
            report(len(results), len(states))
            local = missing[start : start + world.size][world.rank : world.rank + 1]
            made = [_caption(folder.job(number, states[number]), captions_of) for number in local]
            for one in (one for rank in world.gather_objects(made) for one in rank):
                results[one.number] = one
                if journal is not None:
                    journal.add(one)
        report(len(results), len(states))
        summary = CaptionSummary(results)
        if world.is_main:
            _finish(folder, summary)
    return summary


def _caption(job: CaptionJob, captions_of: Captioner) -> CaptionedShard:
    made = caption_shard(job, captions_of)
    if made.num_samples:
        index_shard(job.path, _WHERE)
    return made


@contextmanager
def _journal(folder: CaptionFolder, world: World) -> Iterator[Journal[CaptionedShard] | None]:
    """The folder's journal, on the main rank alone. Raises UserError for a folder of anything else."""
    if not world.is_main:
        yield None
        return
    out = folder.out
    try:
        is_new = not (out / JOURNAL).exists()
        if is_new and out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UserError(f"--out: {out} holds other files; name a new folder")
        with open_journal(out, folder.plan(), CAPTIONING) as journal:
            yield journal
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or reason(error)}") from error


def _finished(folder: CaptionFolder, journal: Journal[CaptionedShard], states: list[str]) -> dict[int, CaptionedShard]:
    """The shards whose copies are there, whole. Raises UserError where one has changed since it was copied."""
    finished = {}
    for number, one in journal.results.items():
        if not 0 <= number < len(states):
            continue  # no shard of this plan, whoever wrote it there
        path = folder.path(number)
        if (path.stat().st_size if path.exists() else 0) != one.num_bytes:
            continue
        if one.state != states[number] and one.num_bytes:
            raise UserError(
                f"--out: {folder.shards[number]} has changed since {path} was made of it; remove that one, or name a "
                "new folder"
            )
        if one.state == states[number]:
            finished[number] = one
    return finished


def _finish(folder: CaptionFolder, summary: CaptionSummary) -> None:
    lines = ({"shard": folder.shards[number], **asdict(one)} for number, one in summary.left_out)
    write_text(folder.out / LEDGER, "".join(json.dumps(line) + "\n" for line in lines))
    index_folder([folder.path(number) for number, one in sorted(summary.shards.items()) if one.num_samples], _WHERE)
