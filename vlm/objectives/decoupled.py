"""Decoupled contrastive learning: the positive pair is not in its own denominator."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.term import Needs, PairTerm


@TERMS.register("decoupled")
class Decoupled(PairTerm):
    """DCL, and DCLW with weighted positives (Yeh et al., 2022), between images and texts.

    value = 1/N sum_i [ -w_i a s_ii + (log sum_{j != i} exp(a s_ij) + log sum_{j != i} exp(a s_ji)) / 2 ]

    with s_ij = <x_i, y_j>, a the logit scale, and w_i = 1 (DCL) or w_i = 2 - exp(s_ii / sigma) / mean_k exp(s_kk /
    sigma) over the global batch (DCLW; the weights' mean is 1). The paper sums the two directions: weight 2. InfoNCE's
    gradient carries a factor of 1 - p_ii, which silences easy pairs where negatives are few; here it is gone.

    Nothing bounds the value from below: it falls for ever with the temperature once pairs are aligned. A learnable
    logit scale runs to its limit of 100; a fixed one, or another term beside this one, holds it. A row without any
    negative (its sample alone in the batch) only attracts.
    """

    takes_providers: ClassVar[bool] = True

    weighting: Literal["von_mises"] | None = Field(
        default=None, description="von_mises: DCLW, pairs that are far apart attract more; null: DCL"
    )
    sigma: float = Field(default=0.5, gt=0, le=1000, description="width of von_mises, in units of cosine similarity")
    detach_weights: bool = Field(default=False, description="take the weights as constants in the gradient")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(gathered=frozenset({"text"}))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        attraction, *of_both = pairs.logits(pairs.logit_scale)
        of_images, of_texts = (_or_zero(negatives) for negatives in of_both)
        if self.weighting is not None:
            weights = self._weights(pairs.positive_similarity(), pairs)
            attraction = attraction * (weights.detach() if self.detach_weights else weights)
        return pairs.share((of_images + of_texts) / 2 - attraction)

    def _weights(self, similarity: Tensor, pairs: Pairs) -> Float[Tensor, " rows"]:
        # The largest is taken out: it cancels in the quotient, and a small sigma does not overflow.
        own_largest = similarity.max() if len(similarity) else similarity.new_full((), float("-inf"))
        values = ((similarity - pairs.ranks.largest(own_largest)) / self.sigma).exp()
        return 2 - values / (pairs.ranks.sum(values.sum()) / pairs.ranks.num_rows)


def _or_zero(log_sums: Tensor) -> Tensor:
    return torch.where(log_sums.isneginf(), 0.0, log_sums)
