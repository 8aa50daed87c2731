"""The `counterfactuals` of a recipe's data: which editors make captions that are almost right."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, PlainSerializer, WithJsonSchema, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from data.counterfactuals import (  # noqa: F401 - each registers its editors
    number_editor,
    order_editors,
    stored_editor,
    word_editors,
)
from data.counterfactuals.editor import EDITORS, Editor
from vlm.config import Config
from vlm.registered import by_name, names_alone, schema_by_name, written_by_name

Editors = Annotated[
    dict[str, Editor],
    BeforeValidator(by_name(EDITORS, lambda options: options or {})),
    PlainSerializer(written_by_name(EDITORS)),
    WithJsonSchema(schema_by_name(EDITORS, {"type": "null"})),
]


class CounterfactualsConfig(Config):
    """Captions that are almost right, made from the caption of each sample for terms that tell them from true ones.

    An editor's name alone may stand for it, or a list of names: `counterfactuals: number`. One of one's own is named
    `package.module:Class`.
    """

    editors: Annotated[Editors, Field(min_length=1, description="Editors by name; `kind` where that is another.")]
    per_caption: Annotated[
        Literal["one", "each"],
        Field(description="one: by one of the editors that apply, drawn by weight; each: one by each of them."),
    ] = "one"

    @model_validator(mode="before")
    @classmethod
    def _names_alone(cls, given: Any) -> Any:
        return names_alone(given, "editors")

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """A mapping, or names alone."""
        name = {"anyOf": [{"enum": sorted(EDITORS.names())}, {"type": "string", "pattern": ":"}]}
        return {"anyOf": [name, {"type": "array", "items": name, "minItems": 1}, handler(schema)]}
