"""A folder with the counting set of some shards: the same bytes from any number of ranks, and through any kill."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from data.check.samples import FindingError, OpenShard
from data.convert.indexing import index_folder, index_shard
from data.convert.journal import FinishedShard, Journal, JournalKind
from data.convert.on_ranks import LeftOut, ShardFiles, journal_on_main, plan_of, states_of, write_left_out
from data.counting.choice import Choice, choose
from data.counting.copies import Copy, CopyJob, content_of, write_copy
from data.counting.judge import JudgeJob, Part, judge
from data.counting.report import CountingReport
from data.counting.source import CountSource
from data.shards.tar import NoTarError
from vlm.aside import remove_files
from vlm.atomic import write_text
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError

JOURNAL: Final = "counting-journal.jsonl"
LEDGER: Final = "counting-ledger.jsonl"
REPORT: Final = "counting.json"
DETECTIONS: Final = "counting-detections.jsonl"
"""What a detector saw, as it can be read again: another choice needs no other look."""
_WHERE: Final = "vlm data counting"

Made = TypeVar("Made", Part, Copy)
Progress = Callable[[str, int, int], None]
"""Called with the name of a pass, how much of it is done, and how much there is to do."""


@dataclass(frozen=True)
class Finished(FinishedShard):
    """Something that is done: a part that was judged, or a copy; `number` says as the how manieth."""

    part: Part | None = None
    copy: Copy | None = None


COUNTING: Final = JournalKind(JOURNAL, Finished, "counting set", "making a counting set")


@dataclass(frozen=True)
class CountingFolder(ShardFiles):
    """The copies in `out` of shards, `names` telling for each its copy's path below it, and who counts.

    Of each number from 2 to 6 at most `most_per_number` samples are kept; None: as many as the most frequent larger one
    has.
    """

    source: CountSource
    seed: int = 0
    most_per_number: int | None = None

    def plan(self) -> dict[str, Any]:
        """All that the bytes depend on but the shards' contents, by which the folder is known again."""
        balance = {"seed": self.seed, "most_per_number": self.most_per_number}
        return plan_of(self.names, {**self.source.plan(), **balance})


class CountingSet(NamedTuple):
    """What was written: its figures, and what cannot be used, with the number of its shard."""

    report: CountingReport
    left_out: tuple[tuple[int, LeftOut], ...]


def write_counting_set(
    folder: CountingFolder, world: World, progress: Progress = lambda _work, _done, _total: None
) -> CountingSet:
    """Judge every sample, choose, and write those that stay; then index the folder and write the report. Collective.

    Called again after a kill, it goes on: nothing is detected twice but what was in work. Called again at the end, it
    does nothing.

    Raises:
        UserError: the folder holds something else, a shard has changed since it was judged, or one cannot be read.
        EveryRankError: the detections know none of the samples.
    """
    states = states_of(folder.shards, world)
    with journal_on_main(folder.out, folder.plan(), COUNTING, world) as journal:
        return _Making(folder, world, journal, states, progress).run()


@dataclass(frozen=True)
class _Making:
    """One run; the main rank alone has the journal, and so what is done."""

    folder: CountingFolder
    world: World
    journal: Journal[Finished] | None
    states: list[str]
    progress: Progress

    def run(self) -> CountingSet:
        """Judge, choose, write, report."""
        self._judge()
        choice = self._choice()
        self._write(choice)
        report = _from_main(self.world, self._finish(choice) if self.world.is_main else None)
        return CountingSet(report, choice.left_out)

    def _judge(self) -> None:
        done = _from_main(self.world, self._parts_done())
        whole = {shard for shard, parts in done.items() if len(parts) == max(parts.values())}
        open_shards = [number for number in range(len(self.states)) if number not in whole]
        jobs = [
            JudgeJob(number, self.folder.shards[number], self.states[number], frozenset(done.get(number, ())))
            for number in open_shards[self.world.rank :: self.world.size]
        ]
        num_done = len(whole)
        self.progress("shards read", num_done, len(self.states))
        for part in self._gathered(one for job in jobs for one in judge(job, self.folder.source)):
            self._remember(part=part)
            parts = done.setdefault(part.shard, {})
            parts[part.part] = part.parts
            num_done += len(parts) == part.parts
            self.progress("shards read", num_done, len(self.states))

    def _parts_done(self) -> dict[int, dict[int, int]]:
        """For each shard the parts that are done, and how many it has. Raises UserError where one has changed since."""
        done: dict[int, dict[int, int]] = {}
        for part in self._parts():
            if part.state != self.states[part.shard]:
                raise UserError(
                    f"--out: {self.folder.shards[part.shard]} has changed since it was read for {self.folder.out}; "
                    "name a new folder"
                )
            done.setdefault(part.shard, {})[part.part] = part.parts
        return done

    def _choice(self) -> Choice:
        """The choice that the main rank makes of all parts."""
        folder = self.folder
        choice: Choice | None = None
        problem = ""
        if self.world.is_main:
            names = tuple(folder.names.values())
            choice = choose(self._parts(), names, folder.source, folder.seed, folder.most_per_number)
            problem = self._problem(choice)
        problem = _from_main(self.world, problem)
        if problem:
            raise EveryRankError(problem)
        choice = _from_main(self.world, choice)
        assert choice is not None
        return choice

    def _problem(self, choice: Choice) -> str:
        """A line where the detections are of other samples; the folder, in which nothing is yet, goes."""
        if not choice.nothing_known or (first := self._first_sample()) is None:
            return ""
        remove_files(self.folder.out, JOURNAL.replace(".", r"\."))
        return self.folder.source.nothing_known(*first)

    def _first_sample(self) -> tuple[str, dict[str, Any]] | None:
        """The key and the fields of the first sample that has any."""
        for shard in self.folder.shards:
            with suppress(NoTarError), OpenShard(shard) as samples:
                for one in samples:
                    with suppress(FindingError):
                        return one.key, one.fields()
        return None

    def _write(self, choice: Choice) -> None:
        copies = _from_main(self.world, {one.shard: one for one in self._copies()})
        missing = [number for number in sorted(choice.kept) if not self._is_whole(copies.get(number), choice)]
        missing = _from_main(self.world, missing)
        jobs = [
            CopyJob(number, self.folder.shards[number], choice.kept[number], self.folder.path(number))
            for number in missing[self.world.rank :: self.world.size]
        ]
        num_done = len(choice.kept) - len(missing)
        self.progress("shards written", num_done, len(choice.kept))
        for copy in self._gathered(map(_write, jobs)):
            self._remember(copy=copy)
            num_done += 1
            self.progress("shards written", num_done, len(choice.kept))

    def _is_whole(self, copy: Copy | None, choice: Choice) -> bool:
        if copy is None or copy.content != content_of(choice.kept[copy.shard]):
            return False
        path = self.folder.path(copy.shard)
        return path.exists() and path.stat().st_size == copy.num_bytes

    def _finish(self, choice: Choice) -> CountingReport:
        folder = self.folder
        for one in self._copies():
            if one.shard not in choice.kept:
                folder.path(one.shard).unlink(missing_ok=True)
        write_left_out(folder.out / LEDGER, folder.shards, choice.left_out)
        if folder.source.looks:
            lines = (json.dumps({"key": key, "counts": counts}) + "\n" for key, counts in choice.detected)
            write_text(folder.out / DETECTIONS, "".join(lines))
        index_folder([folder.path(number) for number in sorted(choice.kept)], _WHERE)
        report = CountingReport.of(choice, folder.plan(), folder.source.names, len(folder.shards))
        report.write(folder.out / REPORT)
        return report

    def _gathered(self, local: Iterable[Made]) -> Iterator[Made]:
        """What all ranks make, on each of them, as it is made. Collective."""
        made = iter(local)
        while together := [one for one in self.world.gather_objects(next(made, None)) if one is not None]:
            yield from together

    def _remember(self, *, part: Part | None = None, copy: Copy | None = None) -> None:
        if self.journal is not None:
            number = max(self.journal.results, default=-1) + 1
            self.journal.add(Finished(number, part, copy))

    def _parts(self) -> list[Part]:
        results = self.journal.results.values() if self.journal is not None else ()
        parts = (one.part for one in results if one.part is not None and 0 <= one.part.shard < len(self.states))
        return list({(part.shard, part.part): part for part in parts}.values())

    def _copies(self) -> list[Copy]:
        results = self.journal.results.values() if self.journal is not None else ()
        return [one.copy for one in results if one.copy is not None and 0 <= one.copy.shard < len(self.states)]


def _write(job: CopyJob) -> Copy:
    copy = write_copy(job)
    index_shard(job.path, _WHERE)
    return copy


def _from_main(world: World, value: Any) -> Any:
    """The value that the main rank has. Collective."""
    return world.gather_objects(value if world.is_main else None)[0]
