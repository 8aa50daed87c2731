"""What the model makes of a batch, and the objective's terms read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """One rank's embeddings: unit-norm rows in at least fp32, pair i being `image[i]` and `text[i]`.

    `captions` holds all captions of the images where the batch brings several (`Batch.captions` says whose each is).
    `parameters` is what terms learn beside the model, by `term/name`.
    """

    image: Float[Tensor, "batch dim"]
    text: Float[Tensor, "batch dim"]
    logit_scale: Float[Tensor, "1"]
    logit_bias: Float[Tensor, "1"] | None = None
    captions: Float[Tensor, "captions dim"] | None = None
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
