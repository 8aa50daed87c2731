"""What a build remembers in its folder, so that a killed one goes on and two different ones never mix."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TextIO

from data.build.shard import BadRow, Finished
from vlm.atomic import write_text
from vlm.errors import UserError

JOURNAL: Final = "build-journal.jsonl"


class Journal:
    """The plan in the first line, then a line for each finished shard, in the order in which they were finished."""

    def __init__(self, file: TextIO, finished: dict[int, Finished]) -> None:
        self.finished = finished
        self._file = file

    def add(self, shard: Finished) -> None:
        """Remember that this shard is complete."""
        self._file.write(_line(asdict(shard)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.finished[shard.number] = shard


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
        finished: dict[int, Finished] = {}
        if path.exists():
            finished = _read(path, folder, plan)
        elif any(folder.glob("*.tar")):
            raise UserError(f"{folder}: already holds shards, but no {JOURNAL}; name a new folder")
        for left in folder.glob(f".{shard_names}.*.partial"):
            left.unlink()
        # Rewritten whole: the last line of a killed build may be cut.
        write_text(path, _line({"plan": plan}) + "".join(_line(asdict(shard)) for shard in finished.values()))
        with path.open("a", encoding="utf-8") as file:
            yield Journal(file, finished)
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder}: another process is building in this folder") from error
    except OSError:
        return  # a file system without locks


def _read(path: Path, folder: Path, plan: dict[str, Any]) -> dict[int, Finished]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        there = json.loads(lines[0])["plan"]
        values = [json.loads(line) for line in lines[1:] if line.endswith("\n")]
        shards = [Finished(**{**value, "bad": tuple(BadRow(**row) for row in value["bad"])}) for value in values]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name a new folder") from error
    different = [name for name in plan if there.get(name) != plan[name]]
    if different:
        changes = ", ".join(f"{name} was {there.get(name)!r}, is now {plan[name]!r}" for name in different[:3])
        raise UserError(
            f"{folder}: holds the shards of another build ({changes}); name a new folder, or empty this one"
        )
    return {shard.number: shard for shard in shards}


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"
