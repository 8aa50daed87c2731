"""What the model makes of a batch, and the objective's terms read."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """One rank's embeddings: unit-norm rows in at least fp32, pair i being `image[i]` and `text[i]`."""

    image: Float[Tensor, "batch dim"]
    text: Float[Tensor, "batch dim"]
    logit_scale: Float[Tensor, "1"]
    logit_bias: Float[Tensor, "1"] | None = None
