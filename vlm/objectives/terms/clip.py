"""The contrastive loss of CLIP and ALIGN over the pairs of all ranks."""

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm


@TERMS.register("clip")
class Clip(PairTerm):
    """The symmetric InfoNCE loss: all pairs of the global batch are negatives of each other.

    value = -1/(2N) sum_i [ sum_j t_ij log softmax_j(a <x_i, y_j>) + sum_j t_ij log softmax_j(a <y_i, x_j>) ]

    with a the logit scale, N pairs, and t_ij = (1 - e) [i = j] + e / N at a label smoothing of e (CLIP: Radford et al.,
    2021, figure 3; smoothing: ALIGN, Jia et al., 2021, which sums the two directions: weight 2). A sample that is in
    the batch twice is not a negative of itself. A margin m lowers a pair's own logit to a (<x_i, y_i> - m) in the
    softmax and in its own share of the target; the spread share e / N is of logits without margin.
    """

    takes_providers: ClassVar[bool] = True

    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all N columns")
    margin: float = Field(default=0.0, ge=0, le=2, description="subtracted from the positives' similarity")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between[1:]))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        return clip(step.pairs, step.logit_scale, label_smoothing=self.label_smoothing, margin=self.margin)


def clip(
    pairs: Pairs, scale: Float[Tensor, "1"], *, label_smoothing: float = 0.0, margin: float = 0.0
) -> Float[Tensor, ""]:
    """The loss of `Clip` at a logit scale."""
    pair_logit, x_negatives, y_negatives = pairs.infonce_statistics(scale)
    positive = pair_logit - scale * margin
    # log(1 + exp(negatives - positive)): with an aligned pair nothing is lost to 1 - 1. (softplus gives up at 20.)
    losses = -(logsigmoid(positive - x_negatives) + logsigmoid(positive - y_negatives)) / 2
    if label_smoothing:
        losses = losses + label_smoothing * (positive - _mean_logits(pairs, scale))
    return pairs.mean(losses)


def _mean_logits(pairs: Pairs, scale: Float[Tensor, "1"]) -> Float[Tensor, " rows"]:
    """The mean of a pair's logits over all columns, both directions together: products with mean embeddings."""
    mean_x, mean_y = (pairs.ranks.sum(rows.sum(0)) / pairs.ranks.num_rows for rows in (pairs.x, pairs.y))
    return scale * (pairs.x @ mean_y + pairs.y @ mean_x) / 2
