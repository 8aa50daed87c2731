"""How a recipe writes its evaluations: by name, each of a registered kind or of one's own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Union

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from eval import geometry, retrieval, zeroshot  # noqa: F401 (each registers its evaluator)
from eval.evaluator import EVALUATORS, EvaluationContext, EvaluatorConfig
from vlm.config import located_problem
from vlm.errors import UserError
from vlm.evaluation import Evaluator
from vlm.paths import Named


def _read(value: Any) -> Any:
    """The configuration of the class that `kind` names; what is no mapping is refused later."""
    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    if not isinstance(kind, str):
        problem = "string_type" if "kind" in value else "missing"
        raise _refusal(InitErrorDetails(type=problem, loc=("kind",), input=kind))
    try:
        cls = EVALUATORS.find(kind)
    except UserError as error:
        raise _refusal(InitErrorDetails(type=_in_words(str(error)), loc=("kind",), input=kind)) from None
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        path, words = located_problem(error, cls)
        raise _refusal(InitErrorDetails(type=_in_words(words), loc=tuple(path), input=value)) from None


def _refusal(details: InitErrorDetails) -> ValidationError:
    return ValidationError.from_exception_data("evaluation", [details])


def _in_words(words: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", "{words}", {"words": words})


class _OrOnesOwn:
    """In the JSON schema, beside the kinds that ship: a class of the user's own, whose keys nobody knows."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        kind = {"description": "the class of your own configuration", "pattern": ":", "type": "string"}
        schema = handler(core_schema)
        return {
            **schema,
            "oneOf": [*schema["oneOf"], {"properties": {"kind": kind}, "required": ["kind"], "type": "object"}],
        }


_KINDS = tuple(cls for _, cls in sorted(EVALUATORS.all().items()))  # by name, whichever was imported first
_Shipped = Annotated[Union[_KINDS], Field(discriminator="kind")]  # type: ignore[valid-type] # noqa: UP007
AnyEvaluatorConfig = Annotated[
    SerializeAsAny[EvaluatorConfig], BeforeValidator(_read, json_schema_input_type=_Shipped), _OrOnesOwn()
]
Evaluations = Named[AnyEvaluatorConfig]


def build_evaluators(configs: Mapping[str, EvaluatorConfig], context: EvaluationContext) -> dict[str, Evaluator]:
    """The evaluators of a recipe by name, their data found and checked. Raises UserError for what is wrong with it."""
    return {
        name: build_evaluator(config, replace(context, prefix=f"{context.prefix}evaluate.{name}."))
        for name, config in configs.items()
    }


def build_evaluator(config: EvaluatorConfig, context: EvaluationContext) -> Evaluator:
    """One evaluator, its data found and checked; a configuration of the user's own may build anything.

    Raises:
        UserError: something is wrong with the data, or what was built is no evaluator.
    """
    evaluator: object = config.build(context)
    if not isinstance(evaluator, Evaluator):
        raise UserError(
            f"{context.where('kind')}: {config.kind} builds a {type(evaluator).__name__}, which is no evaluator: "
            "derive it from vlm.evaluation.Evaluator"
        )
    return evaluator
