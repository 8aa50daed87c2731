"""Files of class names, as evaluation reads them and `vlm data build` writes them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from data.samples.captions import readable
from vlm.errors import UserError, nearest

_KEYS = ("classes", "templates")


class ClassFile(NamedTuple):
    """Class names by number, and prompt templates where the file has some."""

    names: tuple[str, ...]
    templates: tuple[str, ...] | None


def read_class_file(path: Path, where: str) -> ClassFile:
    """The names in a file: JSON (a list, or an object of `classes` and `templates`), or text, one a line.

    Raises:
        UserError: the file cannot be read, or holds something else; the line begins with `where`.
    """
    stored = read_list_file(path, where)
    if not isinstance(stored, dict):
        return ClassFile(strings(stored, where), None)
    unknown = sorted(stored.keys() - set(_KEYS))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]:.60}; {nearest(unknown[0], _KEYS)}")
    templates = stored.get("templates")
    return ClassFile(
        strings(stored.get("classes"), f"{where}: classes"),
        None if templates is None else strings(templates, f"{where}: templates"),
    )


def read_list_file(path: Path, where: str) -> Any:
    """The value in a JSON file; of a text file (.txt) its lines, stripped, without empty ones. Raises as above."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".txt":
            return [line.strip() for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        kind = "text" if path.suffix.lower() == ".txt" else "JSON"
        raise UserError(f"{where}: not readable as {kind}: {error}") from None


def strings(value: Any, where: str) -> tuple[str, ...]:
    """A list of texts, none empty. Raises UserError, which begins with `where`, for anything else."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) and item for item in value):
        raise UserError(f"{where}: expected a list of strings, at least one and none empty, found {_shown(value)}")
    return tuple(map(readable, value))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
