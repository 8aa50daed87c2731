"""The choice between a true and a false counterpart: the loss of counting, and of degraded images."""

from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.outputs import Outputs

ScaleChoice = Literal["none", "logit_scale"] | Annotated[float, Field(gt=0, le=1e4)]
"""The factor of cosines in a softmax: none, the model's own (as a constant), or a number."""


def two_way(
    positive: Float[Tensor, " rows"], negative: Float[Tensor, " rows"], scale: Float[Tensor, "1"] | float
) -> Float[Tensor, " rows"]:
    """-log( exp(a p) / (exp(a p) + exp(a n)) ) = log(1 + exp(-a (p - n))) of each row, at a scale of a."""
    return -logsigmoid(scale * (positive - negative))


def scale_of(choice: ScaleChoice, outputs: Outputs) -> Float[Tensor, "1"] | float:
    """The factor that is chosen; the logit scale without gradient."""
    if choice == "logit_scale":
        return outputs["logit_scale"].detach()
    return 1.0 if choice == "none" else choice
