"""A folder of shards with generated captions: the same bytes from any number of ranks, and through any kill."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from data.check.samples import FindingError, OpenShard, StoredSample
from data.convert.indexing import index_folder, index_shard
from data.convert.journal import JournalKind
from data.convert.on_ranks import LeftOut, ShardWork, all_left_out, share_out, write_ledger
from data.generated.fields import CaptionField, GeneratedCaption, Origin
from data.generated.shard import CaptionedShard, Captioner, CaptionJob, caption_shard
from vlm.distributed.world import World

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
        return all_left_out(self.shards)

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
    def work(self) -> ShardWork[CaptionedShard]:
        """The work on all shards."""
        options = {**self.origin.to_json(), "field": self.field.name, "min_score": self.min_score}
        return ShardWork(self.names, self.out, CAPTIONING, options)

    @property
    def shards(self) -> tuple[str, ...]:
        """The shards by number."""
        return self.work.shards

    def job(self, number: int, state: str) -> CaptionJob:
        """The work on one shard."""
        return CaptionJob(
            number=number,
            shard=self.shards[number],
            state=state,
            path=self.work.path(number),
            field=self.field,
            origin=self.origin,
            min_score=self.min_score,
            together=self.together,
        )

    def captions(self) -> Iterator[tuple[str, GeneratedCaption]]:
        """The captions that were written, shard by shard: name of the copy and key, caption. Raises UserError."""
        for number, name in enumerate(self.names.values()):
            if self.work.path(number).exists():
                with OpenShard(str(self.work.path(number))) as shard:
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
    """Write what is missing as `share_out` does, then index the folder. Collective. Raises UserError as that."""

    def caption(number: int, state: str) -> CaptionedShard:
        job = folder.job(number, state)
        made = caption_shard(job, captions_of)
        if made.num_samples:
            index_shard(job.path, _WHERE)
        return made

    def finish(results: Mapping[int, CaptionedShard]) -> None:
        write_ledger(folder.out / LEDGER, folder.shards, results)
        written = [folder.work.path(number) for number, one in sorted(results.items()) if one.num_samples]
        index_folder(written, _WHERE)

    return CaptionSummary(share_out(folder.work, caption, finish, world, report))
