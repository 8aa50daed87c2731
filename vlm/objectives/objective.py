"""The objective of a recipe: a weighted sum of terms."""

from typing import Annotated, Any

from jaxtyping import Float
from pydantic import BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema
from torch import Tensor

from vlm.batch import Batch
from vlm.config import first_problem
from vlm.encoded import Encoded
from vlm.objectives import clip  # noqa: F401 (registers its terms)
from vlm.objectives.registry import find_term, registered
from vlm.objectives.term import Term
from vlm.world import World


def _read_terms(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    terms = {}
    for name, options in value.items():
        if isinstance(options, Term):
            terms[name] = options
            continue
        term = find_term(str(name))
        try:
            terms[name] = term.model_validate(options if isinstance(options, dict) else {"weight": options})
        except ValidationError as error:
            raise ValueError(f"{name}.{first_problem(error, term)}") from None
    if not any(isinstance(term, Term) and term.weight for term in terms.values()):
        raise ValueError("an objective needs at least one term with a weight other than 0")
    return terms


def _write_terms(terms: dict[str, Term]) -> dict[str, Any]:
    return {name: term.model_dump(mode="json") for name, term in terms.items()}


def _schema() -> dict[str, Any]:
    terms = {
        name: {"anyOf": [{"type": "number", "description": "weight"}, term.model_json_schema()]}
        for name, term in registered().items()
    }
    return {"type": "object", "properties": terms, "patternProperties": {":": {}}, "additionalProperties": False}


# `{name: weight}` or `{name: {weight: ..., option: ...}}` in a recipe.
Objective = Annotated[
    dict[str, Term], BeforeValidator(_read_terms), PlainSerializer(_write_terms), WithJsonSchema(_schema())
]


def evaluate_objective(
    terms: dict[str, Term], encoded: Encoded, batch: Batch, world: World
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """This rank's share of the weighted sum, and of each term by name. A term of weight 0 is not computed."""
    shares = {name: term(encoded, batch, world) for name, term in terms.items() if term.weight}
    total = sum((terms[name].weight * share for name, share in shares.items()), start=encoded.image.new_zeros(()))
    return total, {name: share.detach() for name, share in shares.items()}
