"""Programs in a recipe or in a checkpoint's manifest: what runs where the file is used."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

COMMAND = "pipe:"
# Where a name with a colon means a class to import, whatever stands around the colon: the import alone runs code.
_IMPORTING = (("objective",), ("providers",))
# Where a value with a colon does, under this key.
_IMPORTING_VALUES: Mapping[tuple[str, ...], str] = {
    ("evaluate",): "kind",
    ("objective",): "kind",
    ("providers",): "kind",
    ("optimizer",): "kind",
    ("schedule",): "kind",
}
# Keys of the data below which a name with a colon, a `kind` or a value means one.
_IMPORTING_DATA = frozenset({"counterfactuals", "degraded"})
# The key whose value itself is a class with a colon.
_IMPORTED = ("engine",)
_TOWERS = (("model", "towers", "image"), ("model", "towers", "text"))


class Program(NamedTuple):
    """A place in the file (its dotted key) and what stands there."""

    key: str
    text: str


def programs(values: Any) -> list[Program]:
    """All that would run as a program: shell commands, classes imported by name, code that comes with a download.

    `values` is what was read from YAML or JSON, or a model's `model_dump(mode="json")`. Looked for are texts that begin
    with `pipe:`, `package.module:Class` as a key or `kind` of objectives, providers and editors of data, as a key of
    towers, as a `kind` of evaluations, the optimizer and the schedule, or as the engine, and a `trust_remote_code` that
    is not false. A model's configuration stands under `model`.
    """
    return list(_walk(values, ()))


def imported_towers(values: Any) -> list[Program]:
    """The classes among the `programs` that are towers: the one kind of program that a checkpoint may name."""
    places = tuple(".".join(path) for path in _TOWERS)
    of_towers = (program for program in programs(values) if program.key.startswith(places))
    return [program for program in of_towers if ":" in program.text and not program.text.lstrip().startswith(COMMAND)]


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[Program]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            inner_path = (*path, str(key))
            edits = path[:1] == ("data",) and not _IMPORTING_DATA.isdisjoint(path)
            if (path[:1] in _IMPORTING or path[:3] in _TOWERS or edits) and ":" in str(key):
                yield Program(".".join(path), str(key))
            names_class = key == ("kind" if edits else _IMPORTING_VALUES.get(path[:1]))
            if names_class and isinstance(inner, str) and ":" in inner:
                yield Program(".".join(inner_path), inner)
            if key == "trust_remote_code" and inner:
                yield Program(".".join(inner_path), str(inner))
            yield from _walk(inner, inner_path)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _walk(inner, (*path, str(place)))
    elif isinstance(value, str) and (value.lstrip().startswith(COMMAND) or (_is_imported(path) and ":" in value)):
        yield Program(".".join(path), value)


def _is_imported(path: tuple[str, ...]) -> bool:
    """Whether a text at this path names a class: an engine, or an editor by its name alone or in a list of such."""
    names = path[:-1] if path and path[-1].isdecimal() else path
    return path == _IMPORTED or (path[:1] == ("data",) and names[-1] in _IMPORTING_DATA)
