"""Evaluators by name: each is built by its configuration from one context, and runs on any model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from data.shards.cache import ShardCache
from vlm.config import Config
from vlm.duration import PositiveDuration
from vlm.evaluation import Evaluator
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import TokenBatch
from vlm.registry import Registry


@dataclass(frozen=True)
class EvaluationContext:
    """All that an evaluator is built from beside its configuration.

    Attributes:
        image: the images that the model takes.
        tokenizer: makes token ids of texts, as the model's text tower takes them.
        root: the folder below which names of shards and files are looked for.
        cache: keeps copies of remote and gzipped shards; None: in the user's cache folder.
        prefix: stands before the configuration's keys in messages ("evaluate.NAME.").
        options: the options of a command line that stand for keys of the configuration ("shards": "--data").
    """

    image: ImageSpec
    tokenizer: Callable[[Sequence[str]], TokenBatch]
    root: str | None = None
    cache: ShardCache | None = None
    prefix: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """The name of a key of the configuration in messages."""
        return self.options.get(key, f"{self.prefix}{key}")


class EvaluatorConfig(Config, ABC):
    """One evaluation of a recipe; each kind of evaluator adds its keys and says how it is built."""

    kind: Annotated[str, Field(description="The evaluator: a name, or your own as package.module:Class.")]
    every: Annotated[
        PositiveDuration | None, Field(description="In training, evaluate this often; null: only at the end.")
    ] = None

    plots: ClassVar[tuple[str, ...]] = ()
    """The names of the files that its evaluations draw."""

    def check_files(self, root: str | None, where: Callable[[str], str]) -> None:
        """Raise UserError for what is wrong with its files, before there is a model; `where` names keys in messages."""

    @abstractmethod
    def build(self, context: EvaluationContext) -> Evaluator:
        """The evaluator, its data found and checked. Raises UserError for what is wrong with it."""


EVALUATORS: Registry[type[EvaluatorConfig]] = Registry("evaluator", EvaluatorConfig)
