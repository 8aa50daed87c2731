"""How a recipe writes an objective and its providers, or names a preset.

`{clip: 1.0}` is a term with its weight, `{clip: {label_smoothing: 0.1}}` one with options, and
`{near: {kind: clip, between: [image, region]}}` one under a name of its own, so that several of a kind are possible.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema

from vlm.config import first_problem
from vlm.objectives.presets import PRESETS, preset
from vlm.objectives.providers import feature_transform, mixed_negatives, queue  # noqa: F401 - each registers itself
from vlm.objectives.registry import PROVIDERS, TERMS
from vlm.objectives.term import Provider, Term
from vlm.objectives.terms import (  # noqa: F401 - each registers itself
    alignment,
    attract_repel,
    caption,
    clip,
    clustered_negatives,
    continuous,
    cross_correlation,
    cyclic,
    decoupled,
    fast_clip,
    group_excluded,
    hard,
    individual_temperature,
    interleaved,
    momentum_distillation,
    multi_head,
    multi_positive,
    ordering,
    sigmoid,
    supervised,
    uniformity,
    whitening,
)
from vlm.registry import Registry

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _reader(registry: Registry[Any], short: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Any]:
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


def _kind_of(name: str, options: dict[str, Any]) -> str:
    """The kind of a part, taken out of its options; it has another name than its kind only where both are said."""
    kind = options.pop("kind", name)
    if not isinstance(kind, str):
        raise ValueError(f"{name}.kind: found {kind!r}; input should be the name of a kind")  # noqa: TRY004 - of a file
    if kind != name and not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: letters, digits, _ and - are, beginning with a letter or digit")
    return kind


def _read_terms(value: Any) -> Any:
    written = preset(value) if isinstance(value, str) else value
    terms = _reader(TERMS, lambda weight: {"weight": weight})(written)
    if isinstance(terms, dict) and not any(isinstance(term, Term) and term.weight for term in terms.values()):
        raise ValueError("an objective needs at least one term with a weight other than 0")
    return terms


def _writer(registry: Registry[Any]) -> Callable[[dict[str, BaseModel]], dict[str, Any]]:
    def write(configs: dict[str, BaseModel]) -> dict[str, Any]:
        written = {}
        for name, config in configs.items():
            kind = registry.name_of(type(config))
            named = {} if kind == name or ":" in name else {"kind": kind}
            written[name] = {**named, **config.model_dump(mode="json")}
        return written

    return write


def _schema(registry: Registry[Any], short: dict[str, Any]) -> dict[str, Any]:
    schemas = {
        name: {"description": (kind.__doc__ or "").partition("\n")[0], "anyOf": [short, kind.model_json_schema()]}
        for name, kind in registry.all().items()
    }
    named = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}
    return {"type": "object", "properties": schemas, "patternProperties": {":": {}}, "additionalProperties": named}


Terms = Annotated[
    dict[str, Term],
    BeforeValidator(_read_terms),
    PlainSerializer(_writer(TERMS)),
    WithJsonSchema(
        {"anyOf": [{"enum": list(PRESETS)}, _schema(TERMS, Term.model_json_schema()["properties"]["weight"])]}
    ),
]

Providers = Annotated[
    dict[str, Provider],
    BeforeValidator(_reader(PROVIDERS, lambda options: options or {})),
    PlainSerializer(_writer(PROVIDERS)),
    WithJsonSchema(_schema(PROVIDERS, {"type": "null"})),
]
