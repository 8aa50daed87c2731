"""The commonest mistakes in a recipe, told before torch is imported, by the stored schema of `vlm schema`.

What this finds is wrong; what it does not find is looked at by the configurations themselves.
"""

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm.errors import nearest

SCHEMA = Path(__file__).parent / "recipe_schema.json"

_BOUNDS: Mapping[str, tuple[Callable[[float, float], bool], str]] = {
    "exclusiveMinimum": (operator.gt, "greater than"),
    "minimum": (operator.ge, "greater than or equal to"),
    "exclusiveMaximum": (operator.lt, "less than"),
    "maximum": (operator.le, "less than or equal to"),
}


def quick_problem(values: Mapping[str, Any]) -> str | None:
    """One line on the first mistake in a recipe's values, unknown keys first; None where nothing is seen."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    problems = list(_Check(schema.get("$defs", {})).problems(schema, values, ""))
    return next((line for line in problems if ": unknown key" in line), problems[0] if problems else None)


class _Check:
    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions

    def problems(self, schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
        """The certain mistakes in a value, a line each."""
        if "$ref" in schema:
            schema = self._definitions[schema["$ref"].rpartition("/")[2]]
        if "oneOf" in schema:
            yield from self._of_kind(schema, value, path)
        elif "anyOf" in schema:
            yield from self._of_any(schema["anyOf"], value, path)
        elif "enum" in schema or "const" in schema:
            yield from _of_choices(schema.get("enum", [schema.get("const")]), value, path)
        elif schema.get("type") in ("integer", "number"):
            yield from _of_number(schema, value, path)
        elif schema.get("type") == "object" and isinstance(value, dict):
            yield from self._of_mapping(schema, value, path)
        elif schema.get("type") == "object":
            yield f"{path}: found {_shown(value)}; input should be a mapping of keys to values"
        elif schema.get("type") == "string":
            yield from _of_text(schema, value, path)
        elif schema.get("type") == "array" and isinstance(value, list):
            item_schemas = schema.get("prefixItems", [])
            for place, inner in enumerate(value):
                item_schema = item_schemas[place] if place < len(item_schemas) else schema.get("items")
                if isinstance(item_schema, dict):
                    yield from self.problems(item_schema, inner, f"{path}.{place}")

    def _of_mapping(self, schema: Mapping[str, Any], value: dict[str, Any], path: str) -> Iterator[str]:
        keys, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        dotted = f"{path}." if path else ""
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{dotted}{name}: this key is required"
        for name, inner in value.items():
            if name in keys:
                yield from self.problems(keys[name], inner, f"{dotted}{name}")
            elif (named := _by_pattern(schema, name, inner)) is not None:
                yield from self.problems(named, inner, f"{dotted}{name}")
            elif rest is not True and not _is_newer(schema.get("title", ""), name):
                shown = name if name.isprintable() and len(name) <= 60 else _shown(name)
                yield f"{dotted}{shown}: unknown key (value {_shown(inner)}); {nearest(name, keys)}"

    def _of_kind(self, schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
        """One of several mappings, told apart by a key."""
        discriminator = schema.get("discriminator", {})
        kind = value.get(discriminator.get("propertyName")) if isinstance(value, dict) else None
        branch = discriminator.get("mapping", {}).get(kind) if isinstance(kind, str) else None
        if isinstance(value, dict) and "kind" not in value:
            branch = discriminator.get("defaultMapping")
        if branch is not None:
            yield from self.problems({"$ref": branch}, value, path)

    def _of_any(self, branches: list[Mapping[str, Any]], value: Any, path: str) -> Iterator[str]:
        if value is None and any(branch.get("type") == "null" for branch in branches):
            return
        others = [branch for branch in branches if branch.get("type") != "null"]
        by_branch = [list(self.problems(branch, value, path)) for branch in others]
        if not all(by_branch):
            return
        fitting = [
            place
            for place, branch in enumerate(others)
            if self._is_mapping(branch) == isinstance(value, dict) and "pattern" not in branch
        ]
        if len(fitting) == 1 or len(others) == 1:
            yield from by_branch[fitting[0] if fitting else 0]

    def _is_mapping(self, schema: Mapping[str, Any]) -> bool:
        if "$ref" in schema:
            schema = self._definitions[schema["$ref"].rpartition("/")[2]]
        return schema.get("type") == "object"


def _by_pattern(schema: Mapping[str, Any], name: str, value: Any) -> Mapping[str, Any] | None:
    """The schema of the value under one key of a mapping with free keys; None where the key is not free."""
    for pattern, inner in schema.get("patternProperties", {}).items():
        if re.search(pattern, name):
            return inner  # type: ignore[no-any-return]
    rest = schema.get("additionalProperties")
    if not isinstance(rest, dict):
        return None
    if rest.get("required") == ["kind"] and not (isinstance(value, dict) and "kind" in value):
        return None  # a name of one's own says what kind it is of
    return rest


def _of_choices(choices: list[Any], value: Any, path: str) -> Iterator[str]:
    if value in choices or (isinstance(value, str) and _is_written(value, choices)):
        return
    words = [repr(choice) for choice in choices]
    alternatives = f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
    yield f"{path}: found {_shown(value)}; input should be {alternatives}"


def _of_text(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{path}: found {_shown(value)}; input should be a valid string"
    elif "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{path}: found {_shown(value)}; input should match {schema['pattern']!r}"


def _of_number(schema: Mapping[str, Any], value: Any, path: str) -> Iterator[str]:
    is_integer = schema["type"] == "integer"
    number = value
    if isinstance(value, bool):
        yield f"{path}: found {value}; input should be a number, not true or false"
        return
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if not isinstance(number, int | float):
        yield f"{path}: found {_shown(value)}; input should be a valid {'integer' if is_integer else 'number'}"
        return
    if not isinstance(number, int) and not math.isfinite(number):
        yield f"{path}: found {_shown(value)}; input should be a finite number"
        return
    if is_integer and number != int(number):
        yield f"{path}: found {_shown(value)}; input should be a valid integer, got a number with a fractional part"
    for word, (holds, words) in _BOUNDS.items():
        if word in schema and not holds(number, schema[word]):
            yield f"{path}: found {_shown(value)}; input should be {words} {schema[word]}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _sources() -> Iterator[str]:
    for package in ("vlm", "data", "eval", "launch"):
        for path in (SCHEMA.parent.parent / package).rglob("*.py"):
            yield path.read_text(encoding="utf-8", errors="replace")


def _is_written(choice: str, others: list[Any]) -> bool:
    """Whether some source registers this choice, or has it beside all others: the stored schema may be older."""
    quoted = f'"{choice}"'
    return any(
        f"register({quoted}" in text or (len(others) == 1 or all(f'"{other}"' in text for other in others))
        for text in _sources()
        if quoted in text
    )


def _is_newer(title: str, key: str) -> bool:
    """Whether the class of this name, or one that it stands on, has a key that the stored schema does not know."""
    for text in _sources():
        if f"class {title}(" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name == title:
                fields = {
                    statement.target.id
                    for statement in node.body
                    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
                }
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                return key in fields or any(_is_newer(base, key) for base in bases)
    return False
