"""How a recipe writes an objective (`{name: weight}`, `{name: {option: ...}}` or a preset) and its providers."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema

from vlm.config import first_problem
from vlm.objectives import (  # noqa: F401 (each registers its terms or providers)
    alignment,
    attract_repel,
    clip,
    clustered_negatives,
    continuous,
    cross_correlation,
    cyclic,
    decoupled,
    fast_clip,
    feature_transform,
    group_excluded,
    hard,
    individual_temperature,
    mixed_negatives,
    momentum_distillation,
    multi_head,
    multi_positive,
    ordering,
    queue,
    sigmoid,
    supervised,
    uniformity,
    whitening,
)
from vlm.objectives.presets import PRESETS, preset
from vlm.objectives.registry import PROVIDERS, TERMS
from vlm.objectives.term import Provider, Term
from vlm.registry import Registry


def _reader(registry: Registry[Any], short: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        found = {}
        for name, options in value.items():
            if isinstance(options, BaseModel):
                found[name] = options
                continue
            kind = registry.find(str(name))
            try:
                found[name] = kind.model_validate(options if isinstance(options, dict) else short(options))
            except ValidationError as error:
                whole = not error.errors(include_url=False)[0]["loc"]  # the options together, not one of them
                raise ValueError(f"{name}{': ' if whole else '.'}{first_problem(error, kind)}") from None
        return found

    return read


def _read_terms(value: Any) -> Any:
    written = preset(value) if isinstance(value, str) else value
    terms = _reader(TERMS, lambda weight: {"weight": weight})(written)
    if isinstance(terms, dict) and not any(isinstance(term, Term) and term.weight for term in terms.values()):
        raise ValueError("an objective needs at least one term with a weight other than 0")
    return terms


def _write(parts: dict[str, BaseModel]) -> dict[str, Any]:
    return {name: part.model_dump(mode="json") for name, part in parts.items()}


def _schema(registry: Registry[Any], short: dict[str, Any]) -> dict[str, Any]:
    parts = {
        name: {"description": (kind.__doc__ or "").partition("\n")[0], "anyOf": [short, kind.model_json_schema()]}
        for name, kind in registry.all().items()
    }
    return {"type": "object", "properties": parts, "patternProperties": {":": {}}, "additionalProperties": False}


Terms = Annotated[
    dict[str, Term],
    BeforeValidator(_read_terms),
    PlainSerializer(_write),
    WithJsonSchema(
        {"anyOf": [{"enum": list(PRESETS)}, _schema(TERMS, Term.model_json_schema()["properties"]["weight"])]}
    ),
]

Providers = Annotated[
    dict[str, Provider],
    BeforeValidator(_reader(PROVIDERS, lambda options: options or {})),
    PlainSerializer(_write),
    WithJsonSchema(_schema(PROVIDERS, {"type": "null"})),
]
