"""Evaluators: built once from the recipe, run on any model by all ranks together."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Protocol, runtime_checkable

from pydantic import Field

from data.shards.cache import ShardCache
from eval.encoder import Encoder
from eval.geometry import Geometry, GeometryEvaluationConfig
from eval.retrieval import Retrieval, RetrievalConfig
from eval.zeroshot import ZeroShot, ZeroShotConfig
from vlm.batch import Skip
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import TokenBatch
from vlm.training.data_record import DataRecord
from vlm.world import World

EvaluatorConfig = Annotated[ZeroShotConfig | RetrievalConfig | GeometryEvaluationConfig, Field(discriminator="kind")]


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model; every rank does its share, and the figures depend neither on their number nor on batch size."""

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines on the set that a reader of the figures should know."""

    @property
    def record(self) -> DataRecord:
        """What tells the set that is measured on from another, wherever it lies."""

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """The samples that were of no use so far, as far as this rank knows."""

    @property
    def figures(self) -> Collection[str]:
        """The names of the figures that `run` may bring."""

    def run(self, model: Encoder, world: World) -> dict[str, float]:
        """The figures by name, the same on every rank. Collective."""


def build_evaluators(
    configs: Mapping[str, EvaluatorConfig],
    image: ImageSpec,
    tokenizer: Callable[[Sequence[str]], TokenBatch],
    root: str | None,
    cache: ShardCache | None = None,
) -> dict[str, Evaluator]:
    """The evaluators of a recipe by name, their data found and checked. Raises UserError for what is wrong with it.

    `cache` keeps copies of remote and gzipped shards; None: in the user's cache folder.
    """
    return {
        name: build_evaluator(config, image, tokenizer, root, f"evaluate.{name}.shards", cache)
        for name, config in configs.items()
    }


def build_evaluator(
    config: EvaluatorConfig,
    image: ImageSpec,
    tokenizer: Callable[[Sequence[str]], TokenBatch],
    root: str | None,
    where: str,
    cache: ShardCache | None = None,
) -> Evaluator:
    """One evaluator, its data found and checked; `where` is the key or option that says which shards."""
    if isinstance(config, ZeroShotConfig):
        return ZeroShot(config, image, tokenizer, root, where, cache)
    if isinstance(config, GeometryEvaluationConfig):
        return Geometry(config, image, tokenizer, root, where, cache)
    return Retrieval(config, image, tokenizer, root, where, cache)
