"""How a recipe asks for batches of neighbours."""

from typing import Annotated, Literal

from pydantic import Field

from vlm.config import Config
from vlm.paths import LocalPath


class NeighboursConfig(Config):
    """Batches of samples that are near each other, as `vlm data cluster` found them: hard for a contrastive loss.

    by cluster: all that a global batch takes of the source is of one cluster (MCL: Zhang et al., 2024), clusters in
    proportion to their size. by group: groups of mutual neighbours stay together in a global batch. Of each epoch what
    fills no batch is left out, other samples every time.
    """

    labels: Annotated[LocalPath, Field(description="A folder that `vlm data cluster` wrote; it may know more shards.")]
    by: Annotated[
        Literal["cluster", "group"], Field(description="Batches of one cluster, or of whole groups (--groups).")
    ] = "cluster"
