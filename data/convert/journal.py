"""A build's journal in its folder, by which a killed build goes on and two different ones never mix."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, TextIO

from pydantic import TypeAdapter, ValidationError

from data.convert.shard import ShardResult
from vlm.atomic import write_text
from vlm.errors import UserError

JOURNAL: Final = "build-journal.jsonl"
CHECKSUM: Final = "checksum"
_RESULT = TypeAdapter(ShardResult)


class Journal:
    """The plan in the first line, then a line for each finished shard, in the order in which they were finished."""

    def __init__(self, file: TextIO, results: dict[int, ShardResult]) -> None:
        self.results = results
        self._file = file

    def add(self, shard: ShardResult) -> None:
        """Remember that this shard is complete."""
        self._file.write(_line(asdict(shard)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.results[shard.number] = shard


@contextmanager
def open_journal(folder: Path, plan: dict[str, Any], shard_names: str) -> Iterator[Journal]:
    """The journal of the build `plan` in `folder`, which is then this process's alone; `shard_names` is a glob pattern.

    Raises:
        UserError: the folder holds another plan or other shards, or another process is building in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder)
        path = folder / JOURNAL
        results: dict[int, ShardResult] = {}
        if path.exists():
            results = _read(path, folder, plan)
        elif any(folder.glob("*.tar")):
            raise UserError(f"{folder}: already holds shards, but no {JOURNAL}; name a new folder")
        for left in folder.glob(f".{shard_names}.*.partial"):
            left.unlink()
        # Rewritten whole: the last line of a killed build may be cut.
        write_text(path, _line({"plan": plan}) + "".join(_line(asdict(shard)) for shard in results.values()))
        with path.open("a", encoding="utf-8") as file:
            yield Journal(file, results)
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder}: another process is building in this folder") from error
    except OSError:
        return  # a file system without locks


def _read(path: Path, folder: Path, plan: dict[str, Any]) -> dict[int, ShardResult]:
    first, *lines = path.read_bytes().split(b"\n")
    there, sealed = _values(first)
    there = None if there is None else there.get("plan")
    if not isinstance(there, dict):
        raise UserError(f"{path}: is damaged: its first line does not say what was built; name a new folder")
    shards = [shard for line in lines[:-1] if (shard := _shard(line, sealed=sealed)) is not None]
    different = [name for name in plan if there.get(name) != plan[name]]
    if different:
        changes = ", ".join(f"{name} was {there.get(name)!r}, is now {plan[name]!r}" for name in different[:3])
        raise UserError(
            f"{folder}: holds the shards of another build ({changes}); name a new folder, or empty this one"
        )
    return {shard.number: shard for shard in shards}


def _shard(line: bytes, *, sealed: bool) -> ShardResult | None:
    """The finished shard of a line; None where the line is damaged: what it said is found out by building it again."""
    values, has_checksum = _values(line)
    if values is None or has_checksum != sealed:
        return None
    try:
        return _RESULT.validate_json(json.dumps(values), strict=True)
    except ValidationError:
        return None


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
