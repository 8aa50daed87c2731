"""Recipe files: YAML read with care, bases inherited, single keys overridden. Nothing here takes long to import."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlm.errors import UserError, nearest, reason
from vlm.paths import shown
from vlm.programs import programs
from vlm.sealed import read_sealed
from vlm.training.run_files import RECIPE, RUN
from vlm.yaml_text import MAX_DEPTH, parse_yaml

RECIPES = Path(__file__).parent / "recipes"

_MAX_BYTES = 2**20
_MAX_BASES = 20

# Where `name: null` takes away what a base has under that name; elsewhere null is a value.
_REMOVABLE = (("evaluate",), ("data", "sources"), ("objective",), ("providers",))


class Written(NamedTuple):
    """A recipe as its file, bases and overrides write it; its values are not looked at yet."""

    path: Path
    values: dict[str, Any]


def read_recipe(name: str, overrides: Iterable[str] = (), *, trust: bool = False) -> Written:
    """The recipe in file `name`, or the one that ships under this name, its bases below, `key.path=value` above.

    What would run as a program may stand in the file with `trust` only; an override is the user's own word.

    Raises:
        UserError: no such recipe, no valid YAML, a key that comes twice, a base that is not there or leads back, an
            override that is none, a program in the file.
    """
    path = find_recipe(name)
    values = _read(path, ())
    in_file = set() if trust else set(programs(values))
    if _is_of_a_run(path):
        read_sealed(path)
        if Path(str(values.get("run"))).resolve() != path.parent.resolve():
            values["run"] = str(path.parent)  # the run was copied or moved
    for override in overrides:
        apply_override(values, override)
    for program in programs(values):
        if program in in_file:
            raise UserError(
                f"{path}: {program.key}: {shown(program.text)} would run as a program; --trust runs what stands in it"
            )
    values.setdefault("run", f"runs/{path.stem}")
    return Written(path, values)


def _is_of_a_run(path: Path) -> bool:
    """Whether this is the resolved recipe in a run directory: what it starts goes on there."""
    return path.name == RECIPE and _is_file(path.parent / RUN)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path, or by the name of one that ships. Raises UserError when there is none."""
    path = Path(name)
    if _is_file(path):
        return path
    shipped = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and _is_file(shipped):
        return shipped
    raise UserError(
        f"recipe {name}: no such file, and no recipe ships under this name; {nearest(path.stem, shipped_recipes())}"
    )


def shipped_recipes() -> dict[str, str]:
    """The recipes that ship, by name, each with the comment at its head in one line."""
    heads = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        heads[path.stem] = first.removeprefix("#").strip()
    return heads


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in parents:
        raise UserError(f"{path}: `base:` leads back to itself")
    if len(parents) > _MAX_BASES:
        raise UserError(f"{path}: a chain of more than {_MAX_BASES} bases ends here")
    values = _parsed(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, found {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: base: found {base!r:.60}; it is the file, or the name, of another recipe")
    beside = path.parent / base
    inherited = _read(beside if _is_file(beside) else find_recipe(base), (*parents, path.resolve()))
    return _merge(inherited, values, ())


def recipe_text(path: Path) -> str:
    """The content of the file of a recipe. Raises UserError where that is no text, or cannot be one."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are no recipe; at most {_MAX_BYTES:,} are read")
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {reason(error)}") from None


def _parsed(path: Path) -> Any:
    try:
        return parse_yaml(recipe_text(path)) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_where(error)}") from None


def _where(error: yaml.YAMLError) -> str:
    """A mistake in YAML with its line, in one line."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return f"not readable as YAML: {' '.join(str(error).split())}"
    context = getattr(error, "context", None)  # None where the words are ours
    return f"line {mark.line + 1}: {f'not readable as YAML: {context}, ' if context else ''}{problem}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, a folder that may not be entered
        return False


def _merge(base: dict[str, Any], over: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inherited = merged.get(key)
        if value is None and key in merged and place in _REMOVABLE:
            del merged[key]
        elif isinstance(inherited, dict) and isinstance(value, dict):
            merged[key] = _merge(inherited, value, (*place, key))
        else:
            merged[key] = value
    return merged


def apply_override(values: dict[str, Any], override: str) -> None:
    """Write the value of `key.path=value` into `values`. Raises UserError for what is no such word."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r:.200}: write key.path=value")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        words = _where(error).removeprefix("line 1: ")
        raise UserError(f"override {override!r:.200}: {text!r:.200} is no YAML value ({words})") from None
    *parents, last = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise UserError(f"override {override!r:.200}: nested more than {MAX_DEPTH} deep")
    place: Any = values
    for name in parents:
        place = _step_into(place, name, key)
    if isinstance(place, list):
        place[_position(place, last, key)] = value
    elif value is None and last in place and tuple(parents) in _REMOVABLE:
        del place[last]
    else:
        place[last] = value


def _step_into(place: Any, name: str, key: str) -> Any:
    where: Any = _position(place, name, key) if isinstance(place, list) else name
    inner = place[where] if isinstance(place, list) else place.get(name)
    if not isinstance(inner, dict | list):
        inner = place[where] = {}
    return inner


def _position(place: list[Any], name: str, key: str) -> int:
    if not (name.isascii() and name.isdecimal()) or int(name) >= len(place):
        raise UserError(f"override {key}: {name!r:.60} is no position in a list of {len(place)}")
    return int(name)
