"""The keys that evaluations of held-out shards have in common."""

from typing import Annotated

from pydantic import Field

from data.loading.heldout import HeldOutSet
from data.samples.captions import TxtLayout
from eval.evaluator import EvaluationContext, EvaluatorConfig
from vlm.model.heads import Reading
from vlm.training.precision import Precision

Patterns = str | tuple[str, ...]


class ImageEvaluationConfig(EvaluatorConfig):
    """How held-out images are evaluated, wherever they lie."""

    batch_size: Annotated[int, Field(gt=0, le=2**20, description="Images, or texts, a forward on each rank.")] = 256
    limit: Annotated[int | None, Field(gt=0, le=10**12, description="Only the first so many samples.")] = None
    workers: Annotated[
        int | None,
        Field(
            ge=0,
            le=512,
            description="Loading processes per rank; 0 loads in the process itself; null: 2, and 0 for a few batches.",
        ),
    ] = None
    embedding: Annotated[
        Reading,
        Field(description="What is compared where the model has projection heads: their output, or the towers'."),
    ] = "after_head"
    precision: Annotated[
        Precision, Field(description="Of the towers' products here, whatever the run trains with.")
    ] = "fp32"


class ShardEvaluationConfig(ImageEvaluationConfig):
    """Which held-out shards are evaluated, and how."""

    shards: Annotated[Patterns, Field(description="Tar files: names, {00..03} and * patterns.")]

    def held_out(self, context: EvaluationContext, key: str = "shards") -> HeldOutSet:
        """The samples of the shards that `key` names. Raises UserError, in a line that begins with the key."""
        return self._held_out(context, key, None)

    def _held_out(self, context: EvaluationContext, key: str, txt: TxtLayout | None) -> HeldOutSet:
        return HeldOutSet(
            getattr(self, key),
            context.image,
            root=context.root,
            limit=self.limit,
            cache=context.cache,
            where=context.where(key),
            txt=txt,
        )


class CaptionedEvaluationConfig(ShardEvaluationConfig):
    """The same of shards whose captions matter."""

    txt: Annotated[
        TxtLayout | None,
        Field(
            description="A txt member holds one caption (whole), or one a line (lines); by default the latter where "
            "all have several lines, as in public retrieval sets."
        ),
    ] = None

    def held_out(self, context: EvaluationContext, key: str = "shards") -> HeldOutSet:
        """The same, with captions read as `txt` says."""
        return self._held_out(context, key, self.txt)
