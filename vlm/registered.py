"""Keys of a recipe whose `kind` or name is that of a registered configuration class, or of one of the user's own."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Union

from pydantic import BaseModel, Field, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from vlm.config import first_problem, located_problem
from vlm.errors import UserError
from vlm.registry import Registry

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def reader(registry: Registry[Any], default: str | None = None) -> Callable[[Any], Any]:
    """The function that makes a mapping the configuration of the class that its `kind` names.

    What is no mapping is left to pydantic. `default` is the kind of a mapping that names none; None: it has to.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kind = value.get("kind", default)
        if not isinstance(kind, str):
            problem = "string_type" if "kind" in value else "missing"
            raise _refusal(InitErrorDetails(type=problem, loc=("kind",), input=kind))
        try:
            cls = registry.find(kind)
        except UserError as error:
            raise _refusal(InitErrorDetails(type=_in_words(str(error)), loc=("kind",), input=kind)) from None
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            path, words = located_problem(error, cls)
            raise _refusal(InitErrorDetails(type=_in_words(words), loc=tuple(path), input=value)) from None

    return read


def union_of(registry: Registry[Any]) -> Any:
    """The type that the registered classes are told apart in by their `kind`, for a JSON schema."""
    kinds = tuple(cls for _, cls in sorted(registry.all().items()))  # by name, whichever was imported first
    return Annotated[Union[kinds], Field(discriminator="kind")]  # noqa: UP007


class OrOnesOwn:
    """In the JSON schema, beside the kinds that ship: a class of the user's own, whose keys nobody knows.

    `default` is the kind of a mapping that names none.
    """

    def __init__(self, default: str | None = None) -> None:
        self._default = default

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        kind = {"description": "the class of your own configuration", "pattern": ":", "type": "string"}
        own_class = {"properties": {"kind": kind}, "required": ["kind"], "type": "object"}
        schema = handler(core_schema)
        discriminator = dict(schema["discriminator"])
        if self._default is not None:
            discriminator["defaultMapping"] = discriminator["mapping"][self._default]
        return {**schema, "discriminator": discriminator, "oneOf": [*schema["oneOf"], own_class]}


def by_name(registry: Registry[Any], short: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Any]:
    """The function that makes a mapping by name the configurations of the classes that names, or `kind`s, are of.

    `short` makes what is no mapping one (`clip: 1.0`). What is no mapping by name is left to pydantic.
    """

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        configs = {}
        for name, options in value.items():
            if isinstance(options, BaseModel):
                configs[name] = options
                continue
            written = dict(options) if isinstance(options, dict) else short(options)
            kind = registry.find(_kind_of(str(name), written) if isinstance(written, dict) else str(name))
            try:
                configs[name] = kind.model_validate(written)
            except ValidationError as error:
                is_joint = not error.errors(include_url=False)[0]["loc"]  # the options together, not one of them
                raise ValueError(f"{name}{': ' if is_joint else '.'}{first_problem(error, kind)}") from None
        return configs

    return read


def names_alone(given: Any, field: str) -> Any:
    """A configuration whose `field` is read by `by_name`, where a name or a list of names may stand for all of it."""
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return {field: {name: {} for name in names}}
    return given


def written_by_name(registry: Registry[Any]) -> Callable[[dict[str, BaseModel]], dict[str, Any]]:
    """The function that writes such configurations as `by_name` reads them."""

    def write(configs: dict[str, BaseModel]) -> dict[str, Any]:
        written = {}
        for name, config in configs.items():
            kind = registry.name_of(type(config))
            named = {} if kind == name or ":" in name else {"kind": kind}
            written[name] = {**named, **config.model_dump(mode="json")}
        return written

    return write


def schema_by_name(registry: Registry[Any], short: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of what `by_name` reads; `short` is that of what may stand in place of options."""
    schemas = {
        name: {"description": (kind.__doc__ or "").partition("\n")[0], "anyOf": [short, kind.model_json_schema()]}
        for name, kind in registry.all().items()
    }
    named = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}
    return {"type": "object", "properties": schemas, "patternProperties": {":": {}}, "additionalProperties": named}


def _kind_of(name: str, options: dict[str, Any]) -> str:
    """The kind of a part, taken out of its options; it has another name than its kind only where both are said."""
    kind = options.pop("kind", name)
    if not isinstance(kind, str):
        raise ValueError(f"{name}.kind: found {kind!r}; input should be the name of a kind")  # noqa: TRY004 - of a file
    if kind != name and not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: letters, digits, _ and - are, beginning with a letter or digit")
    return kind


def _refusal(details: InitErrorDetails) -> ValidationError:
    return ValidationError.from_exception_data("kind", [details])


def _in_words(words: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", "{words}", {"words": words})
