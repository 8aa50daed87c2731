"""The journal of work on shards in its folder, by which killed work goes on and two different ones never mix."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Generic, TextIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from vlm.atomic import write_text
from vlm.errors import UserError

CHECKSUM: Final = "checksum"


@dataclass(frozen=True)
class FinishedShard:
    """The base of what is remembered of a finished shard: its number among all."""

    number: int


Result = TypeVar("Result", bound=FinishedShard)


@dataclass(frozen=True)
class JournalKind(Generic[Result]):
    """The journals of one kind of work: their file's name, the dataclass of a shard's result, and words for the work.

    `work` is a noun ("build"), `working` what a process is doing ("building").
    """

    file: str
    result: type[Result]
    work: str
    working: str

    def line(self, shard: Result) -> str:
        """The line of a finished shard."""
        values: dict[str, Any] = self._adapter.dump_python(shard, mode="json")
        return _line(values)

    def read(self, line: bytes, *, sealed: bool) -> Result | None:
        """The finished shard of a line; None where it is damaged: what it said is found out by doing the work again."""
        values, has_checksum = _values(line)
        if values is None or has_checksum != sealed:
            return None
        try:
            shard: Result = self._adapter.validate_json(json.dumps(values), strict=True)
        except ValidationError:
            return None
        return shard

    @cached_property
    def _adapter(self) -> Any:
        return TypeAdapter(self.result)


class Journal(Generic[Result]):
    """The plan in the first line, then a line for each finished shard, in the order in which they were finished."""

    def __init__(self, kind: JournalKind[Result], file: TextIO, results: dict[int, Result]) -> None:
        self.results = results
        self._kind = kind
        self._file = file

    def add(self, shard: Result) -> None:
        """Remember that this shard is complete."""
        self._file.write(self._kind.line(shard))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results[shard.number] = shard


@contextmanager
def open_journal(
    folder: Path, plan: dict[str, Any], kind: JournalKind[Result], shard_names: str = "*.tar"
) -> Iterator[Journal[Result]]:
    """The journal of the work `plan` in `folder`, which is then this process's alone; `shard_names` is a glob pattern.

    Raises:
        UserError: the folder holds another plan or other shards, or another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder, kind.working)
        path = folder / kind.file
        results: dict[int, Result] = {}
        if path.exists():
            results = _read(path, folder, plan, kind)
        elif any(folder.glob("*.tar")):
            raise UserError(f"{folder}: already holds shards, but no {kind.file}; name a new folder")
        for left in folder.glob(f".{shard_names}.*.partial"):
            left.unlink()
        # Rewritten whole: the last line of killed work may be cut.
        write_text(path, _line({"plan": plan}) + "".join(map(kind.line, results.values())))
        with path.open("a", encoding="utf-8") as file:
            yield Journal(kind, file, results)
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path, working: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder}: another process is {working} in this folder") from error
    except OSError:
        return  # a file system without locks


def _read(path: Path, folder: Path, plan: dict[str, Any], kind: JournalKind[Result]) -> dict[int, Result]:
    first, *lines = path.read_bytes().split(b"\n")
    there, sealed = _values(first)
    there = None if there is None else there.get("plan")
    if not isinstance(there, dict):
        raise UserError(f"{path}: is damaged: its first line does not say what it is of; name a new folder")
    shards = [shard for line in lines[:-1] if (shard := kind.read(line, sealed=sealed)) is not None]
    different = [name for name in plan if there.get(name) != plan[name]]
    if different:
        changes = ", ".join(f"{name} was {there.get(name)!r}, is now {plan[name]!r}" for name in different[:3])
        raise UserError(
            f"{folder}: holds the shards of another {kind.work} ({changes}); name a new folder, or empty this one"
        )
    return {shard.number: shard for shard in shards}


def _line(value: dict[str, Any]) -> str:
    return json.dumps({**value, CHECKSUM: _checksum(value)}) + "\n"


def _values(line: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The values in a line, None where it is damaged; and whether it has a checksum, which older ones have not."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(values, dict):
        return None, False
    checksum = values.pop(CHECKSUM, None)
    return (values if checksum in (None, _checksum(values)) else None), checksum is not None


def _checksum(values: dict[str, Any]) -> str:
    return blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()
