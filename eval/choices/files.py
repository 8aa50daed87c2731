"""Files of benchmarks: where they lie, the JSON in them, and their entries, each mistake in one line."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NoReturn

from data.samples.captions import readable
from data.stored_json import parse_json
from vlm.checkpoint.data_record import DataRecord
from vlm.errors import UserError, nearest, reason
from vlm.paths import local_path, shown


def found(name: str, where: str, root: str | None, what: Literal["file", "folder"] = "file") -> Path:
    """The file (or folder) that a name stands for: below `root`, else from the current folder.

    Raises:
        UserError: it begins with `where`; there is no such file.
    """
    path, is_there = local_path(name, where), os.path.isfile if what == "file" else os.path.isdir
    for place in (Path(root or ".") / path, path):
        if is_there(place):
            return place
    raise UserError(f"{where}: {shown(name)}: there is no such {what}" + (f" (below {root})" if root else ""))


@dataclass(frozen=True)
class BenchmarkFile:
    """A file that was read: its value, and words that lead to it in messages."""

    path: Path
    where: str
    value: Any
    digest: str

    def refuse(self, problem: str) -> NoReturn:
        """Raise UserError, which names the file."""
        raise UserError(f"{self.where}: {self.path}: {problem}")


def read_file(path: Path, where: str) -> BenchmarkFile:
    """A JSON file, or one of JSON by line, which is then a list.

    Raises:
        UserError: it cannot be read as either.
    """
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: {path}: cannot be read ({error.strerror or error})") from None
    text = stored.removeprefix(b"\xef\xbb\xbf")
    try:
        value = parse_json(text)
    except ValueError as error:
        value = _by_line(text)
        if value is None:
            raise UserError(f"{where}: {path}: neither JSON nor JSON by line ({reason(error)})") from None
    return BenchmarkFile(path, where, value, blake2b(stored, digest_size=8).hexdigest())


def _by_line(text: bytes) -> list[Any] | None:
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        values = [parse_json(line) for line in lines]
    except ValueError:
        return None
    return values if values and all(isinstance(value, dict) for value in values) else None


def record_of(files: Sequence[BenchmarkFile], num_entries: int) -> DataRecord:
    """The identity of files by their content."""
    return DataRecord(samples=num_entries, shards=len(files), content=tuple(file.digest for file in files)[:64])


@dataclass(frozen=True)
class Entry:
    """An entry of a file, and the words for its place there."""

    file: BenchmarkFile
    place: str
    values: Mapping[str, Any]

    @property
    def words(self) -> str:
        """What leads to it in messages."""
        return f"{self.file.where}: {self.file.path}: {self.place}"

    def refuse(self, problem: str) -> NoReturn:
        """Raise UserError, which names the file and the entry."""
        raise UserError(f"{self.words}: {problem}")

    def text(self, key: str) -> str:
        """The text under a key. Raises UserError where there is none."""
        value = self._value(key)
        if not isinstance(value, str) or not value.strip():
            self.refuse(f"{key}: found {shown(value)}; a text is needed")
        return readable(value.strip())

    def texts(self, key: str, least: int) -> tuple[str, ...]:
        """The texts that are listed under a key, `least` at least. Raises UserError where they are not."""
        value = self._value(key)
        usable = isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)
        if not usable or len(value) < least:
            self.refuse(f"{key}: found {shown(value)}; a list of {least} or more texts is needed")
        return tuple(readable(one.strip()) for one in value)

    def number(self, key: str, least: int, most: int) -> int:
        """The whole number under a key. Raises UserError where it is none, or out of bounds."""
        value = self._value(key)
        if type(value) is not int or not least <= value <= most:
            is_number = type(value) in (int, float) and value == value
            near = f" (nearest: {min(max(round(value), least), most)})" if is_number and abs(value) < 1e18 else ""
            self.refuse(f"{key}: found {shown(value)}; a whole number from {least} to {most} is needed{near}")
        return value

    def _value(self, key: str) -> Any:
        if key not in self.values:
            self.refuse(f"it has no key {key}; {nearest(key, map(str, self.values))}")
        return self.values[key]


def entries_of(file: BenchmarkFile, values: Any, name: str = "entry") -> list[Entry]:
    """The objects of a list, or of an object by their names. Raises UserError for anything else, and for none."""
    listed = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    entries = []
    for place, value in listed:
        words = f"{name} {place if isinstance(place, int) else shown(place)}"
        if not isinstance(value, dict):
            file.refuse(f"{words} is no object but {_kind(value)}")
        entries.append(Entry(file, words, value))
    if not entries:
        file.refuse(f"a list of objects is needed, found {_kind(values)}")
    return entries


def _kind(value: Any) -> str:
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    words = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")


def keys_shown(entry: Entry) -> str:
    """The keys of an entry for a message."""
    return shown(json.dumps(sorted(map(str, entry.values))))
