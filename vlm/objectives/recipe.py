"""How a recipe writes an objective and its providers, or names a preset.

`{clip: 1.0}` is a term with its weight, `{clip: {label_smoothing: 0.1}}` one with options, and
`{near: {kind: clip, between: [image, region]}}` one under a name of its own, so that several of a kind are possible.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from vlm.objectives.presets import PRESETS, preset
from vlm.objectives.providers import (  # noqa: F401 - each registers itself
    counterfactual_negatives,
    feature_transform,
    mixed_negatives,
    queue,
)
from vlm.objectives.registry import PROVIDERS, TERMS
from vlm.objectives.term import Provider, Term
from vlm.objectives.terms import (  # noqa: F401 - each registers itself
    alignment,
    attract_repel,
    caption,
    clip,
    clustered_negatives,
    continuous,
    counting,
    cross_correlation,
    cyclic,
    decoupled,
    fast_clip,
    group_excluded,
    hard,
    hard_negative_captions,
    hard_negative_images,
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
from vlm.registered import by_name, schema_by_name, written_by_name


def _read_terms(value: Any) -> Any:
    written = preset(value) if isinstance(value, str) else value
    terms = by_name(TERMS, lambda weight: {"weight": weight})(written)
    if isinstance(terms, dict) and not any(isinstance(term, Term) and term.weight for term in terms.values()):
        raise ValueError("an objective needs at least one term with a weight other than 0")
    return terms


Terms = Annotated[
    dict[str, Term],
    BeforeValidator(_read_terms),
    PlainSerializer(written_by_name(TERMS)),
    WithJsonSchema(
        {"anyOf": [{"enum": list(PRESETS)}, schema_by_name(TERMS, Term.model_json_schema()["properties"]["weight"])]}
    ),
]

Providers = Annotated[
    dict[str, Provider],
    BeforeValidator(by_name(PROVIDERS, lambda options: options or {})),
    PlainSerializer(written_by_name(PROVIDERS)),
    WithJsonSchema(schema_by_name(PROVIDERS, {"type": "null"})),
]
