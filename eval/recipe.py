"""How a recipe writes its evaluations: by name, each of a registered kind or of one's own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, TypeGuard

from pydantic import BeforeValidator, SerializeAsAny

from eval import (  # noqa: F401 (each registers its evaluator)
    captioning,
    compositional,
    counting,
    generative,
    geometry,
    retrieval,
    zeroshot,
)
from eval.evaluator import EVALUATORS, EvaluationContext, EvaluatorConfig
from vlm.errors import UserError
from vlm.evaluation import Evaluator
from vlm.paths import Named
from vlm.registered import OrOnesOwn, reader, union_of

AnyEvaluatorConfig = Annotated[
    SerializeAsAny[EvaluatorConfig],
    BeforeValidator(reader(EVALUATORS), json_schema_input_type=union_of(EVALUATORS)),
    OrOnesOwn(),
]
Evaluations = Named[AnyEvaluatorConfig]


def build_evaluators(configs: Mapping[str, EvaluatorConfig], context: EvaluationContext) -> dict[str, Evaluator]:
    """The evaluators of a recipe by name, their data found and checked. Raises UserError for what is wrong with it."""
    return {
        name: build_evaluator(config, replace(context, prefix=f"{context.prefix}evaluate.{name}."))
        for name, config in configs.items()
    }


def check_files(configs: Mapping[str, EvaluatorConfig], root: str | None) -> None:
    """Raise UserError for what is wrong with the files of a recipe's evaluations, before there is a model."""
    for name, config in configs.items():
        config.check_files(root, f"evaluate.{name}.{{}}".format)


def build_evaluator(config: EvaluatorConfig, context: EvaluationContext) -> Evaluator:
    """One evaluator, its data found and checked; a configuration of the user's own may build anything.

    Raises:
        UserError: something is wrong with the data, or what was built is no evaluator.
    """
    evaluator: object = config.build(context)
    if not _is_evaluator(evaluator):
        raise UserError(
            f"{context.where('kind')}: {config.kind} builds a {type(evaluator).__name__}, which is no evaluator: "
            "derive it from vlm.evaluation.Evaluator"
        )
    return evaluator


def _is_evaluator(built: object) -> TypeGuard[Evaluator]:
    """Whether this is an evaluator; of what derives from the protocol, its own check would read all properties."""
    return Evaluator in type(built).__mro__ or isinstance(built, Evaluator)
