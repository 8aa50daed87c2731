"""What evaluators on held-out shards have in common."""

from typing import Annotated

from pydantic import Field

from data.captions import TxtLayout
from data.heldout import HeldOutSet
from data.shards.cache import ShardCache
from vlm.config import Config
from vlm.duration import PositiveDuration
from vlm.model.heads import Reading
from vlm.model.image_spec import ImageSpec
from vlm.training.engine import Precision


class ShardEvaluation(Config):
    """Which held-out shards are evaluated, how, and how often in training."""

    shards: Annotated[str | tuple[str, ...], Field(description="Tar files: names, {00..03} and * patterns.")]
    every: Annotated[
        PositiveDuration | None, Field(description="In training, evaluate this often; null: only at the end.")
    ] = None
    batch_size: Annotated[int, Field(gt=0, le=2**20, description="Images, or texts, a forward on each rank.")] = 256
    limit: Annotated[int | None, Field(gt=0, le=10**12, description="Only the first so many samples.")] = None
    workers: Annotated[
        int, Field(ge=0, le=512, description="Loading processes per rank; 0 loads in the process itself.")
    ] = 0
    embedding: Annotated[
        Reading,
        Field(description="What is compared where the model has projection heads: their output, or the towers'."),
    ] = "after_head"
    precision: Annotated[
        Precision, Field(description="Of the towers' products here, whatever the run trains with.")
    ] = "fp32"

    def held_out(self, image: ImageSpec, root: str | None, where: str, cache: ShardCache | None) -> HeldOutSet:
        """The samples, as images for a model of this spec. Raises UserError, in a line that begins with `where`."""
        return HeldOutSet(self.shards, image, root=root, limit=self.limit, cache=cache, where=where)


class CaptionedEvaluation(ShardEvaluation):
    """The same of shards whose captions matter."""

    txt: Annotated[
        TxtLayout | None,
        Field(
            description="A txt member holds one caption (whole), or one a line (lines); by default the latter where "
            "all have several lines, as in public retrieval sets."
        ),
    ] = None

    def held_out(self, image: ImageSpec, root: str | None, where: str, cache: ShardCache | None) -> HeldOutSet:
        """The same, with captions read as `txt` says."""
        return HeldOutSet(self.shards, image, root=root, limit=self.limit, cache=cache, where=where, txt=self.txt)
