"""Keys of a recipe whose `kind` names a registered configuration class, or one of the user's own."""

from collections.abc import Callable
from typing import Annotated, Any, Union

from pydantic import Field, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from vlm.config import located_problem
from vlm.errors import UserError
from vlm.registry import Registry


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


def _refusal(details: InitErrorDetails) -> ValidationError:
    return ValidationError.from_exception_data("kind", [details])


def _in_words(words: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", "{words}", {"words": words})
