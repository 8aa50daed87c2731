"""Detections out of a file, joined to samples by their key or by a field of their json."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data.counting.coco import coco_entries
from data.counting.entries import BadEntryError, Counts, counts_of_classes, in_order, is_sure, name_of
from data.counting.source import Candidate, CountSource, Seen
from data.stored_json import parse_json
from vlm.errors import UserError, nearest
from vlm.paths import shown

KEY: Final = "key"
_LINES = (".jsonl", ".ndjson")
_SHOWN = 3


@dataclass(frozen=True)
class DetectionFile(CountSource):
    """The counts of a file's entries, by what they are joined by: the value of `field` in json, or the sample's key.

    `places` are the numbers of the entries, whose `all_counts` are in the file's order.
    """

    path: Path
    fingerprint: str
    field: str
    min_score: float
    places: dict[str, int]
    all_counts: tuple[Counts, ...]

    def plan(self) -> dict[str, Any]:
        """The content of the file, not where it lies."""
        return {"detections": self.fingerprint, "join": self.field, "min_score": self.min_score}

    @property
    def names(self) -> Sequence[str]:
        """The values that the entries are joined by."""
        return tuple(self.places)

    def entry(self, key: str, fields: Mapping[str, Any]) -> int | None:
        """The entry that names the sample."""
        value = key if self.field == KEY else name_of(fields.get(self.field))
        return None if value is None else self.places.get(value)

    def counts(self, candidates: Sequence[Candidate]) -> Sequence[Seen]:
        """Those of the candidates' entries."""
        return [None if one.entry is None else self.all_counts[one.entry] for one in candidates]

    def nothing_known(self, key: str, fields: Mapping[str, Any]) -> str:
        """What stands on both sides."""
        if self.field == KEY:
            sample, advice = f"has the key {shown(key)}", "; --join FIELD compares a field of the samples' json"
        elif self.field in fields:
            sample, advice = f"has the {self.field} {shown(fields[self.field])}", ""
        else:
            sample, advice = f"{shown(key)} has no field {self.field}", f" ({nearest(self.field, fields)})"
        named = ", ".join(shown(name) for name in self.names[:_SHOWN])
        return f"--detections {self.path}: names none of the samples: it names {named}; a sample {sample}{advice}"


def read_detections(path: Path, field: str, min_score: float) -> DetectionFile:
    """Read JSON lines (.jsonl) or COCO's instances (.json); detections with a score below `min_score` do not count.

    Raises:
        UserError: there is no such file, or a line of it says nothing; file and line are named.
    """
    if path.suffix.lower() not in (*_LINES, ".json"):
        raise UserError(f"--detections: {path}: a file of JSON lines (.jsonl) or of COCO's instances (.json) is needed")
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise UserError(f"--detections: {path} cannot be read ({error.strerror or error})") from error
    if path.suffix.lower() == ".json":
        entries = coco_entries(stored, path, None if field == KEY else field, min_score)
    else:
        entries = _line_entries(stored, path, field, min_score)
    places: dict[str, int] = {}
    wheres: list[str] = []
    all_counts: list[Counts] = []
    known: dict[Counts, Counts] = {}
    for where, name, counts in entries:
        if name in places:
            raise UserError(f"{where}: names {shown(name)} again, after {wheres[places[name]]}")
        places[name] = len(places)
        wheres.append(where)
        all_counts.append(known.setdefault(counts, counts))
    if not places:
        raise UserError(f"--detections: {path}: is empty")
    return DetectionFile(path, hashlib.sha256(stored).hexdigest(), field, min_score, places, tuple(all_counts))


def _line_entries(stored: bytes, path: Path, field: str, min_score: float) -> Iterator[tuple[str, str, Counts]]:
    """Where it stands, what it names and its counts, for each line but empty ones."""
    for number, line in enumerate(stored.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: is no JSON ({error})") from None
        try:
            yield where, *_entry(value, field, min_score)
        except BadEntryError as error:
            raise UserError(f"{where}: {error}") from None


def _entry(value: Any, field: str, min_score: float) -> tuple[str, Counts]:
    if not isinstance(value, dict):
        raise BadEntryError(f"an object is needed, found {shown(value)}")
    if field not in value:
        raise BadEntryError(f"it has no {field!r} ({nearest(field, value)})")
    name = name_of(value[field])
    if name is None:
        raise BadEntryError(f"{field}: a text is needed, found {shown(value[field])}")
    given = [key for key in ("counts", "detections") if key in value]
    if len(given) != 1:
        raise BadEntryError("it has both counts and detections; one is needed" if given else _neither(value))
    if given == ["counts"]:
        return name, counts_of_classes(value["counts"])
    if not isinstance(value["detections"], list):
        raise BadEntryError(f"detections: a list is needed, found {shown(value['detections'])}")
    classes = [_class(one, min_score) for one in value["detections"]]
    return name, in_order(Counter(name for name in classes if name is not None).values())


def _neither(value: dict[str, Any]) -> str:
    return f"it has neither counts nor detections ({nearest('counts', value)})"


def _class(detection: Any, min_score: float) -> str | None:
    """The label of a detection; None where its score is too low."""
    if not isinstance(detection, dict):
        raise BadEntryError(f"detections: an object with a label is needed, found {shown(detection)}")
    label = name_of(detection.get("label"))
    if label is None:
        raise BadEntryError(f"detections: a label is needed, found {shown(detection.get('label'))}")
    return label if is_sure(detection, min_score) else None
