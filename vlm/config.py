"""The base of every configuration: frozen, typed, closed to unknown keys; and how a mistake in one is told."""

import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Union

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from vlm.errors import nearest


class Config(BaseModel):
    """A frozen piece of a recipe; it lives beside what it configures and refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    # Options that mean something for some values of another one only: option -> (the other, those values).
    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, given: Any) -> Any:
        """Python takes true for 1; who writes it for a number meant another key."""
        if isinstance(given, dict):
            for name, value in given.items():
                field = cls.model_fields.get(name)
                where = None if field is None else _truth_for_number(field.annotation, value)
                if where is not None:
                    problem = PydanticCustomError("number", "input should be a number, not true or false")
                    details = InitErrorDetails(type=problem, loc=(name, *where[0]), input=where[1])
                    raise ValidationError.from_exception_data(cls.__name__, [details])
        return given

    @model_validator(mode="after")
    def _no_option_without_meaning(self) -> "Config":
        """An option that changes nothing is refused, unless it has its default: whoever wrote it meant something."""
        for option, (other, choices) in self.only_with.items():
            value, choice = getattr(self, option), getattr(self, other)
            if choice not in choices and value != type(self).model_fields[option].default:
                raise ValueError(
                    f"{option}: found {_shown(value)}, which means nothing with {other}: {_of_choices((choice,))};"
                    f" it is for {other}: {_of_choices(choices)}"
                )
        return self


def _of_choices(choices: tuple[Any, ...]) -> str:
    return " or ".join("null" if choice is None else str(choice) for choice in choices)


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """One line on the first mistake in a configuration: its path, the value found, and what would be right."""
    path, words = located_problem(error, model)
    return f"{'.'.join(path)}: {words}" if path else words


def located_problem(error: ValidationError, model: type[BaseModel]) -> tuple[list[str], str]:
    """The path to the first mistake in a configuration, and the words on it."""
    problems = error.errors(include_url=False)
    # An unknown key explains more than the missing one it was meant for.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = [_key(key) for key in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        parents, owner = _walk(model, location[:-1])
        fields = owner.model_fields if isinstance(owner, type) and issubclass(owner, BaseModel) else {}
        unknown = f"unknown key (value {_shown(problem['input'])}); {nearest(location[-1], fields)}"
        return [*parents, location[-1]], unknown
    path = _walk(model, location)[0]
    if problem["type"] == "missing":
        return path, "this key is required"
    words = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own validators name the value
        return path, words
    return path, f"found {_shown(problem['input'])}; {words[0].lower()}{words[1:]}"


def _key(key: int | str) -> str:
    """One part of a path, in one line whatever was written."""
    text = str(key)
    return text if text.isprintable() and len(text) <= 60 else _shown(text)


def _truth_for_number(annotation: Any, value: Any) -> tuple[tuple[int | str, ...], bool] | None:
    """Where within `value` true or false stands for a number, and which of them; None where it does not."""
    if not isinstance(value, bool | list | tuple | dict):
        return None
    kinds = [_plain(member) for member in _members(_plain(annotation))]
    if isinstance(value, bool):
        return ((), value) if {int, float}.intersection(kinds) and bool not in kinds else None
    if not any(isinstance(inner, bool) for inner in (value.values() if isinstance(value, dict) else value)):
        return None
    items = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) in (tuple, list, dict)]
    for place, inner in value.items() if isinstance(value, dict) else enumerate(value):
        located = next(
            (_truth_for_number(item[-1 if item[-1] is not ... else 0], inner) for item in items if item), None
        )
        if located is not None:
            return (place, *located[0]), located[1]
    return None


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _walk(annotation: Any, location: list[str]) -> tuple[list[str], Any]:
    """The path as the user wrote it, and the type at its end.

    Where a value may be of several types, pydantic's own path also says which of them it tried; that part is left out.
    """
    annotation = _plain(annotation)
    if not location:
        return [], annotation
    key, rest = location[0], location[1:]
    members = _members(annotation)
    if len(members) > 1:
        inner = next((member for member in members if key in _labels(member)), None)
        return _walk(inner, rest)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and key in annotation.model_fields:
        path, end = _walk(annotation.model_fields[key].annotation, rest)
    elif typing.get_origin(annotation) in (dict, list, tuple):
        items = [item for item in typing.get_args(annotation) if item is not ...]
        path, end = _walk(items[-1], rest)
    else:
        path, end = list(rest), None
    return [key, *path], end


def _plain(annotation: Any) -> Any:
    """The type without its metadata and without None."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    members = _members(annotation)
    return _plain(members[0]) if len(members) == 1 and members[0] is not annotation else annotation


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [member for member in typing.get_args(annotation) if member is not type(None)]
    return [annotation]


def _labels(annotation: Any) -> set[str]:
    """How pydantic may call a member of a union: its name, or the single value of a field that tells members apart."""
    plain = _plain(annotation)
    labels = {str(getattr(plain, "__name__", plain))}
    if isinstance(plain, type) and issubclass(plain, BaseModel):
        choices = (typing.get_args(field.annotation) for field in plain.model_fields.values())
        labels |= {str(values[0]) for values in choices if len(values) == 1 and isinstance(values[0], str)}
    return labels
