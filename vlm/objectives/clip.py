"""The contrastive loss of CLIP and ALIGN over the pairs of all ranks."""

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
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
        return Needs(gathered=frozenset({"text"}))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        own, of_images, of_texts = pairs.logits(pairs.logit_scale)
        positive = own - pairs.logit_scale * self.margin
        # log(1 + exp(negatives - positive)): with an aligned pair nothing is lost to 1 - 1. (softplus gives up at 20.)
        losses = -(logsigmoid(positive - of_images) + logsigmoid(positive - of_texts)) / 2
        if self.label_smoothing:
            losses = losses + self.label_smoothing * (positive - self._mean_logits(pairs))
        return pairs.share(losses)

    def _mean_logits(self, pairs: Pairs) -> Float[Tensor, " rows"]:
        """The mean of a pair's logits over all columns, both directions together: products with mean embeddings."""
        mean_text = pairs.ranks.sum(pairs.text.sum(0)) / pairs.ranks.num_rows
        mean_image = pairs.ranks.sum(pairs.image.sum(0)) / pairs.ranks.num_rows
        return pairs.logit_scale * (pairs.image @ mean_text + pairs.text @ mean_image) / 2
