"""How pairs are compared across ranks, as a recipe says it."""

from typing import Literal

from pydantic import Field

from vlm.config import Config


class SimilarityConfig(Config):
    """The exchange of embeddings between ranks, and the precision of products.

    Either exchange is exact at fp32. A bf16 wire rounds what other ranks' rows are compared with, bf16 products round
    the factors of all products: gradients differ by 0.01 to 2.5 % in norm from those of fp32, and what a term selects
    (hardest negatives, nearest neighbours) may differ too.

    `group_ranks` changes the objective: pairs are negatives within a group of consecutive ranks, and the value is
    the mean of the groups' losses, not the loss of the whole batch (M2-Encoder, Guo et al., 2024; about log(W / k)
    lower at its minimum). Temperature and learning rate want to be tuned again.
    """

    exchange: Literal["gather", "ring"] = Field(
        default="gather",
        description="gather: one collective, all columns in memory; ring: blocks of columns pass by during the tiles",
    )
    wire: Literal["fp32", "bf16"] = Field(default="fp32", description="precision of embeddings on the wire")
    product: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="precision of the factors of products; auto: bf16 if precision is, and no term picks hard pairs",
    )
    group_ranks: int | None = Field(
        default=None, gt=0, le=2**20, description="ranks in a group of negatives; null: all ranks"
    )
