"""Copies of shards whose samples have mined captions in their json: whole, the same through any kill."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from data.check.samples import FindingError, OpenShard, StoredSample
from data.convert.indexing import index_folder, index_shard
from data.convert.journal import JournalKind
from data.convert.on_ranks import LeftOut, MadeOfShard, ShardWork, share_out, write_ledger
from data.generated.shard import add_sample
from data.mining.mine import Likeness, Mined, Miner
from data.shards.reader import ShardReader
from data.shards.source import Source
from data.shards.tar import MOST_BYTES, NoTarError
from data.shards.tar_writing import tar_aside
from vlm.distributed.world import World
from vlm.errors import UserError, reason

JOURNAL: Final = "mining-journal.jsonl"
LEDGER: Final = "mining-ledger.jsonl"
_WHERE: Final = "vlm data negatives"


@dataclass(frozen=True)
class MinedShard(MadeOfShard):
    """The outcome of one shard; `num_mined` samples got captions, and what was like what."""

    num_samples: int
    num_mined: int
    likeness: dict[str, Likeness]


MINING: Final = JournalKind(JOURNAL, MinedShard, "mining", "writing mined captions")


@dataclass(frozen=True)
class MiningFolder:
    """The copies in `out` of a source's shards, `names` telling for each its copy's path below it.

    `embeddings` is the identity of the embeddings by which captions were found.
    """

    source: Source
    reader: ShardReader
    names: Mapping[str, str]
    out: Path
    embeddings: str

    def work(self, miner: Miner) -> ShardWork[MinedShard]:
        """The work on all shards."""
        return ShardWork(self.names, self.out, MINING, {"embeddings": self.embeddings, **asdict(miner.config)})


def write_mined(
    folder: MiningFolder, miner: Miner, report: Callable[[int, int], None] = lambda _done, _total: None
) -> dict[int, MinedShard]:
    """Write what is missing as `share_out` does, in this process, then index the folder. Raises UserError as that."""
    work = folder.work(miner)
    shards = {shard: number for number, shard in enumerate(folder.source.shards)}

    def make(number: int, state: str) -> MinedShard:
        return _Copy(folder, shards[work.shards[number]], work.path(number), miner).write(number, state)

    def finish(results: Mapping[int, MinedShard]) -> None:
        write_ledger(folder.out / LEDGER, work.shards, results)
        index_folder([work.path(number) for number, one in sorted(results.items()) if one.num_samples], _WHERE)

    return share_out(work, make, finish, World(), report)


@dataclass(frozen=True)
class _Copy:
    """The copy of one shard, by its number in the source, at `path`."""

    folder: MiningFolder
    shard: int
    path: Path
    miner: Miner

    def write(self, number: int, state: str) -> MinedShard:
        left_out: list[LeftOut] = []
        num_samples = num_mined = 0
        try:
            with OpenShard(self.folder.source.shards[self.shard]) as shard:
                left_out += [LeftOut(finding.key, finding.reason) for finding in shard.findings]
                if num_samples := len(shard):
                    with tar_aside(self.path) as tar:
                        for sample in shard:
                            new_json = self._new_json(sample)
                            if isinstance(new_json, str):
                                left_out.append(LeftOut(sample.key, new_json))
                            add_sample(tar, sample, new_json if isinstance(new_json, bytes) else None)
                            num_mined += isinstance(new_json, bytes)
                    index_shard(self.path, _WHERE)
        except NoTarError as error:
            left_out.append(LeftOut("", str(error)))
        except OSError as error:
            raise UserError(f"{error.filename or self.path}: {error.strerror or reason(error)}") from error
        num_bytes = self.path.stat().st_size if num_samples else 0
        return MinedShard(number, state, num_bytes, tuple(left_out), num_samples, num_mined, self._mined[1])

    def _new_json(self, sample: StoredSample) -> bytes | str:
        """The sample's json with what was mined for it, or why it stays as it is."""
        row = self._rows.get(sample.key)
        mined = None if row is None else self._mined[0].get(row)
        if mined is None:
            return "its captions have no embedding"
        if not all(mined.values()):
            return "no other caption is near it"
        try:
            fields = sample.fields()
        except FindingError as error:
            return str(error)
        there = next((name for name in mined if name in fields), None)
        if there is not None:
            return f"its json has a field {there} already"
        stored = json.dumps({**fields, **mined}).encode()
        if len(stored) > MOST_BYTES["json"]:
            return f"its json would have {len(stored):,} bytes; at most {MOST_BYTES['json']:,} are read"
        return stored

    @cached_property
    def _mined(self) -> tuple[dict[int, Mined], dict[str, Likeness]]:
        return self.miner.of_shard(self.shard, self.folder.source.stable_names[self.shard])

    @cached_property
    def _rows(self) -> dict[str, int]:
        source, reader = self.folder.source, self.folder.reader
        return {source.key(self.shard, row, reader): row for row in self._mined[0]}
