"""Work that makes a file of each shard, shared out among the ranks: the same from any number, and through any kill."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from data.check.samples import shard_state
from data.convert.journal import FinishedShard, Journal, JournalKind, open_journal
from data.pools.base import Job, Pool
from data.shards.store import is_remote, local_path
from vlm.atomic import write_text
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError, reason


@dataclass(frozen=True)
class LeftOut:
    """A sample that got nothing, and why; "" is the key of what concerns the shard as a whole."""

    key: str
    reason: str


@dataclass(frozen=True)
class MadeOfShard(FinishedShard):
    """The base of what is remembered of a shard's file: the shard's state then, bytes (0: no file), who got nothing."""

    state: str
    num_bytes: int
    left_out: tuple[LeftOut, ...]


Made = TypeVar("Made", bound=MadeOfShard)
Result = TypeVar("Result", bound=FinishedShard)


@dataclass(frozen=True)
class ShardFiles:
    """The files that are made of shards: `names` tells for each shard its file's path below `out`."""

    names: Mapping[str, str]
    out: Path

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The shards by number."""
        return tuple(self.names)

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.out / self.names[self.shards[number]]


@dataclass(frozen=True)
class ShardWork(ShardFiles, Generic[Made]):
    """The work: its files, and the journal of its `kind`.

    `options` are all that the files' bytes depend on but the shards' contents, by which the folder is known again.
    """

    kind: JournalKind[Made]
    options: Mapping[str, Any]

    def plan(self) -> dict[str, Any]:
        """The first line of the journal."""
        return plan_of(self.names, self.options)


def plan_of(names: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The first line of a journal of work on the shards `names`."""
    listed = hashlib.blake2b("|".join(names.values()).encode("utf-8", "surrogateescape"), digest_size=4)
    return {"format": 1, **options, "shards": f"{len(names)} ({listed.hexdigest()})"}


def share_out(
    work: ShardWork[Made],
    make: Callable[[int, str], Made],
    finish: Callable[[Mapping[int, Made]], None],
    world: World,
    report: Callable[[int, int], None],
) -> dict[int, Made]:
    """`make(number, state)` for every shard whose file is missing, whole shards on each rank; the results by number.

    At the end rank 0 calls `finish`. Called again after a kill, it goes on from the finished shards; called again at
    the end, it makes nothing. `report` is called with the number of shards that are done, and of all. Collective.

    Raises:
        UserError: the folder holds something else, a shard that is done has changed since, or one cannot be read.
    """
    states = states_of(work.shards, world)
    with journal_on_main(work.out, work.plan(), work.kind, world) as journal:
        finished = {} if journal is None else _finished(work, journal, states)
        results: dict[int, Made] = world.gather_objects(finished)[0]
        missing = [number for number in range(len(states)) if number not in results]
        for start in range(0, len(missing), world.size):
            report(len(results), len(states))
            local = missing[start : start + world.size][world.rank : world.rank + 1]
            made = [make(number, states[number]) for number in local]
            for one in (one for rank in world.gather_objects(made) for one in rank):
                results[one.number] = one
                if journal is not None:
                    journal.add(one)
        report(len(results), len(states))
        if world.is_main:
            finish(results)
    return results


def map_out(
    work: ShardWork[Made],
    job: Callable[[int, str], Job],
    make: Callable[[Job], Made],
    finish: Callable[[Mapping[int, Made]], None],
    pool: Pool,
    report: Callable[[int, int], None],
) -> dict[int, Made]:
    """The same by the processes of a pool: `make(job(number, state))` in one of them. Raises as `share_out`."""
    world = World()
    states = states_of(work.shards, world)
    with journal_on_main(work.out, work.plan(), work.kind, world) as journal:
        assert journal is not None
        results = _finished(work, journal, states)
        missing = [number for number in range(len(states)) if number not in results]
        report(len(results), len(states))
        for one in pool.as_done(make, (job(number, states[number]) for number in missing)):
            results[one.number] = one
            journal.add(one)
            report(len(results), len(states))
        finish(results)
    return results


def states_of(shards: Sequence[str], world: World) -> list[str]:
    """Their states as rank 0 sees them, also where each machine has a copy of its own. Collective."""
    states: list[str] = world.gather_objects([shard_state(shard) for shard in shards] if world.is_main else [])[0]
    return states


def all_left_out(results: Mapping[int, MadeOfShard]) -> list[tuple[int, LeftOut]]:
    """What got nothing, or is no sample or shard at all, with the number of its shard."""
    return [(number, one) for number, shard in sorted(results.items()) for one in shard.left_out]


def write_ledger(path: Path, shards: Sequence[str], results: Mapping[int, MadeOfShard]) -> None:
    """Write a line of JSON for each of those: shard, key, reason."""
    write_left_out(path, shards, all_left_out(results))


def write_left_out(path: Path, shards: Sequence[str], left_out: Sequence[tuple[int, LeftOut]]) -> None:
    """Write the ledger of what got nothing, with the number of its shard."""
    lines = ({"shard": shards[number], **asdict(one)} for number, one in left_out)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def require_same_shards(names: Sequence[str], world: World) -> None:
    """Raise EveryRankError where a pattern means other shards on some machine. Collective."""
    first, *others = world.gather_objects(list(names))
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise EveryRankError(f"SHARDS: rank {rank} sees other shards than rank 0: every machine needs the same")


def require_other_files(names: Mapping[str, str], out: Path) -> None:
    """Raise EveryRankError where a shard's file would replace it, in a folder that was written to before."""
    for shard, name in names.items():
        if not is_remote(shard) and os.path.realpath(local_path(shard)) == os.path.realpath(out / name):
            raise EveryRankError(f"--out: {shard} would be replaced by its own copy; name a new folder")


@contextmanager
def journal_on_main(
    out: Path, plan: dict[str, Any], kind: JournalKind[Result], world: World
) -> Iterator[Journal[Result] | None]:
    """The folder's journal, on the main rank alone. Raises UserError for a folder of anything else."""
    if not world.is_main:
        yield None
        return
    try:
        is_new = not (out / kind.file).exists()
        if is_new and out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UserError(f"--out: {out} holds other files; name a new folder")
        with open_journal(out, plan, kind) as journal:
            yield journal
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or reason(error)}") from error


def _finished(work: ShardWork[Made], journal: Journal[Made], states: Sequence[str]) -> dict[int, Made]:
    """The shards whose files are there, whole. Raises UserError where one has changed since its file was made."""
    finished = {}
    for number, one in journal.results.items():
        if not 0 <= number < len(states):
            continue  # no shard of this plan, whoever wrote it there
        path = work.path(number)
        if (path.stat().st_size if path.exists() else 0) != one.num_bytes:
            continue
        if one.state != states[number] and one.num_bytes:
            raise UserError(
                f"--out: {work.shards[number]} has changed since {path} was made of it; remove that one, or name a "
                "new folder"
            )
        if one.state == states[number]:
            finished[number] = one
    return finished
