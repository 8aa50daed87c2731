"""COCO's instances (images, annotations, categories) as counts of each image's classes."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from data.counting.entries import BadEntryError, Counts, in_order, is_sure, name_of
from data.shards.tar import key_and_suffix
from data.stored_json import parse_json
from vlm.errors import UserError, nearest
from vlm.paths import shown

_LISTS: Final = ("images", "annotations", "categories")
_IMAGE_ID: Final = "image_id"


def coco_entries(stored: bytes, path: Path, field: str | None, min_score: float) -> Iterator[tuple[str, str, Counts]]:
    """Where it stands, what it names and its counts, for each image.

    An image names the sample with its `field`, if it has that itself ("image_id" is its id), else with its file's name;
    for None by the key that this file has in a shard. A class with a crowd, in which nobody counted, has no count.

    Raises:
        UserError: it is no such document, or an entry of its lists says nothing; file, list and place are named.
    """
    document = _document(stored, path)
    names: dict[Any, tuple[str, str]] = {}
    for where, image in _entries(document, "images", path):
        number = _required(image, "id", where)
        if number in names:
            raise UserError(f"{where}: has the id {shown(number)} of another image")
        names[number] = (where, _name(image, field, where))
    categories = {_required(one, "id", where) for where, one in _entries(document, "categories", path)}
    counts = {number: Counter[str]() for number in names}
    crowds: dict[str, set[str]] = {}
    for where, note in _entries(document, "annotations", path):
        number, category = (_required(note, key, where) for key in (_IMAGE_ID, "category_id"))
        for key, value, known in ((_IMAGE_ID, number, names), ("category_id", category, categories)):
            if value not in known:
                raise UserError(f"{where}: {key}: found {shown(value)}, which nothing in the file has as its id")
        try:
            if note.get("iscrowd"):
                crowds.setdefault(number, set()).add(category)
            elif is_sure(note, min_score):
                counts[number][category] += 1
        except BadEntryError as error:
            raise UserError(f"{where}: {error}") from None
    for number, (where, name) in names.items():
        left_out = crowds.get(number, set())
        yield where, name, in_order(count for category, count in counts[number].items() if category not in left_out)


def _document(stored: bytes, path: Path) -> dict[str, Any]:
    try:
        document = parse_json(stored)
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); a file of JSON lines is called .jsonl") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds no COCO instances ({', '.join(_LISTS)}) but a {type(document).__name__}")
    for name in _LISTS:
        if not isinstance(document.get(name), list):
            raise UserError(f"{path}: has no list {name!r}, as COCO's instances do ({nearest(name, document)})")
    return document


def _entries(document: dict[str, Any], name: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, one in enumerate(document[name]):
        where = f"{path}: {name}[{place}]"
        if not isinstance(one, dict):
            raise UserError(f"{where}: an object is needed, found {shown(one)}")
        yield where, one


def _required(one: dict[str, Any], key: str, where: str) -> str:
    """A value by which entries are told apart, as text."""
    value = name_of(one.get(key))
    if value is None:
        raise UserError(f"{where}: {key}: a number or text is needed, found {shown(one.get(key))}")
    return value


def _name(image: dict[str, Any], field: str | None, where: str) -> str:
    if field is not None and (own := name_of(image.get("id" if field == _IMAGE_ID else field))) is not None:
        return own
    file_name = _required(image, "file_name", where)
    if field is not None:
        return file_name
    named = key_and_suffix(file_name)
    return file_name if named is None else named[0]
