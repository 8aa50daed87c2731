"""Slots whose sample cannot be used: what takes its place, decided once, written down before it is used."""

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.order.order import Order, Picks
from data.randomness import Draws
from data.source_names import recipe_key
from vlm.aside import remove_files
from vlm.errors import UserError
from vlm.skip import Skip

# Records of so many steps share a folder, so that a long run can drop those it will not need again.
_STEPS_A_FOLDER = 1_000
_NEAR_DRAWS, _FAR_DRAWS = 64, 1_000
_DIGITS = 6
_BEGIN = re.compile(rb'\{"bytes": "([0-9]{6})"')
_LEAST, _EARLY = 18, b'{"step"'
_END = b', "crc32": "%08x"}'
_COMPLETE = re.compile(rb'(\{"bytes": "[0-9]{6}", .*), "crc32": "([0-9a-f]{8})"\}')

ShardRow = tuple[int, int]
"""The number of a shard in its source, and of a row in the shard."""


@dataclass(frozen=True)
class Substitution:
    """The decision about one slot of a global batch: `row` of `shard` replaces `bad_row` of `bad_shard`.

    Shards are called as their source calls them, wherever it lies; by early versions as the skip does ("").
    """

    step: int
    slot: int
    bad_row: int
    shard: str
    row: int
    skip: Skip
    bad_shard: str = ""

    def is_about(self, names: tuple[str, str], row: int) -> bool:
        """Whether this sample was the one replaced; with another seed or mix the slot would hold another.

        `names` are those of its shard: in full, and in its source.
        """
        return (self.bad_shard or self.skip.shard) in names and self.bad_row == row


class SubstitutionLog:
    """The substitutions of a run, kept in `folder` (None: in memory) by every process that decides one.

    Whether a sample can be read may change with time, so a substitution is state: a resumed run reuses what its earlier
    life decided, prefetched batches included, whichever rank or worker then serves the slot. Picklable into workers,
    each of which appends to a file of its own.
    """

    def __init__(self, folder: Path | None, writer: str) -> None:
        self._folder = folder
        self._writer = writer
        self._known: dict[tuple[int, int], Substitution] = {}

    def find(self, step: int, slot: int) -> Substitution | None:
        """The decision of an earlier life of the run about this slot."""
        return self._known.get((step, slot))

    def record(self, substitution: Substitution) -> None:
        """Keep a decision, on the disk before it is acted on."""
        self._known[substitution.step, substitution.slot] = substitution
        if self._folder is None:
            return
        folder = self._folder / f"{substitution.step // _STEPS_A_FOLDER:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self._writer}-{os.getpid()}.jsonl"
        with path.open("ab") as file:
            # The line break before it ends what a killed process of the same number may have left unfinished.
            file.write(b"\n" + _line(asdict(substitution)) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def discard_before(self, before: int) -> None:
        """Drop from memory what no step from `before` on can need."""
        self._known = {place: known for place, known in self._known.items() if place[0] >= before}

    def load(self, start_step: int, saved: Iterable[Mapping[str, Any]] = ()) -> None:
        """Take up the decisions about steps from `start_step` on: those in a checkpoint, and all in the folder.

        Raises:
            UserError: a record in the folder is damaged.
        """
        for record in (*saved, *self._stored(start_step)):
            known = Substitution(**{**record, "skip": Skip(**record["skip"])})
            if known.step >= start_step:
                self._known[known.step, known.slot] = known

    def state(self, step: int) -> list[dict[str, Any]]:
        """The decisions about batches from number `step` on: prefetched, and not trained on yet."""
        records = {(record["step"], record["slot"]): record for record in self._stored(step)}
        records.update({place: asdict(known) for place, known in self._known.items() if place[0] >= step})
        return list(records.values())

    def discard_folders_before(self, before: int) -> None:
        """Remove the records of steps before `before`, which no checkpoint can lead back to."""
        for folder in self._folders():
            if (int(folder.name) + 1) * _STEPS_A_FOLDER <= before:
                remove_files(folder, r".*\.jsonl")

    def _stored(self, start_step: int) -> Iterator[dict[str, Any]]:
        """The records in the folder, oldest first; a line that a kill tore was never acted on."""
        for folder in self._folders():
            if (int(folder.name) + 1) * _STEPS_A_FOLDER <= start_step:
                continue
            for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
                for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
                    record = _record(line, f"{path}: line {number}")
                    if record is not None and record["step"] >= start_step:
                        yield record

    def _folders(self) -> list[Path]:
        if self._folder is None or not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if path.name.isdecimal())


def _line(record: Mapping[str, Any]) -> bytes:
    """A record as it is stored: its length comes first and a checksum last, so that it is whole, torn or damaged."""
    body = json.dumps({"bytes": "0" * _DIGITS, **record}).encode()[:-1]
    length = len(body) + len(_END % 0)
    body = body.replace(b"0" * _DIGITS, b"%0*d" % (_DIGITS, length), 1)
    return body + _END % zlib.crc32(body)


def _record(line: bytes, where: str) -> dict[str, Any] | None:
    """The record in a line; None where it is empty, or was torn by a kill and so never acted on.

    Raises:
        UserError: it is damaged.
    """
    match = _COMPLETE.fullmatch(line)
    if match is None and (not line or _is_torn(line)):
        return None
    try:
        if int(match[2], 16) != zlib.crc32(match[1]) if match else not line.startswith(_EARLY):
            raise ValueError("its checksum does not match")
        record = json.loads(line)
        fields = {field: record[field] for field in Substitution.__dataclass_fields__ if field != "bad_shard"}
        known = Substitution(**{**fields, "skip": Skip(**record["skip"])}, bad_shard=record.get("bad_shard", ""))
        return asdict(known)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{where} is damaged; without it, what stands in for a bad sample is decided anew") from None


def _is_torn(line: bytes) -> bool:
    begun = _BEGIN.match(line)
    if begun is not None:
        return len(line) < int(begun[1])
    if line.startswith(_EARLY):  # by a version that stored no length
        return not line.endswith(b"}")
    return not line.strip(b"\0") or (len(line) < _LEAST and b'{"bytes": "'.startswith(line[:11]))


def substitutes(order: Order, seed: int, step: int, slot: int) -> Iterator[ShardRow]:
    """(shard, row) of the samples that may take a slot's place, in the order in which they are tried.

    Keyed draws first from the shards that the slot's own sample was shuffled with, which its reader has open, then from
    the whole source. Samples of the same global batch come last: they are there only for data smaller than a batch.
    """
    pick = order.picks(step, range(slot, slot + 1))
    line, (start, count) = order.neighbourhood(pick)
    draws = Draws("substitute", seed, step, slot)
    near = [start + draws.integer(count) for _ in range(_NEAR_DRAWS)]
    far = [draws.integer(line.num_samples) for _ in range(_FAR_DRAWS)]
    stored = line.at(int(pick.epochs[0]), np.asarray(near + far, dtype=np.int64))
    places = dict.fromkeys(zip(stored.shards.tolist(), stored.rows.tolist(), strict=True))
    original = (int(pick.shards[0]), int(pick.rows[0]))
    planned = _planned(order, step, int(pick.sources[0]))
    yield from (place for place in places if place not in planned)
    yield from (place for place in planned if place != original)


def _planned(order: Order, step: int, source: int) -> dict[ShardRow, None]:
    picks: Picks = order.picks(step, range(order.global_batch))
    same_source = picks.sources == source
    return dict.fromkeys(zip(picks.shards[same_source].tolist(), picks.rows[same_source].tolist(), strict=True))


def no_substitute(source: str, tried: int, last: str) -> UserError:
    """The error that ends a run whose source has nothing usable left."""
    return UserError(f"{recipe_key(source)}: {tried:,} samples in a row cannot be used; the last is {last}")
