"""Decoupled contrastive learning: the positive pair is not in its own denominator."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
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

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        "sigma": ("weighting", ("von_mises",)),
        "detach_weights": ("weighting", ("von_mises",)),
    }

    weighting: Literal["von_mises"] | None = Field(
        default=None, description="von_mises: DCLW, pairs that are far apart attract more; null: DCL"
    )
    sigma: float = Field(default=0.5, gt=0, le=1000, description="width of von_mises, in units of cosine similarity")
    detach_weights: bool = Field(default=False, description="take the weights as constants in the gradient")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between[1:]))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        sigma = None if self.weighting is None else self.sigma
        return decoupled(step.pairs, step.logit_scale, sigma=sigma, detach_weights=self.detach_weights)


def decoupled(
    pairs: Pairs, scale: Float[Tensor, "1"], *, sigma: float | None = None, detach_weights: bool = False
) -> Float[Tensor, ""]:
    """The loss of `Decoupled`: DCL, and with `sigma` DCLW."""
    attraction, *both_negatives = pairs.infonce_statistics(scale)
    x_negatives, y_negatives = (torch.where(lse.isneginf(), 0.0, lse) for lse in both_negatives)
    if sigma is not None:
        weights = _attraction_weights(pairs, sigma)
        attraction = attraction * (weights.detach() if detach_weights else weights)
    return pairs.mean((x_negatives + y_negatives) / 2 - attraction)


def _attraction_weights(pairs: Pairs, sigma: float) -> Float[Tensor, " rows"]:
    similarity = pairs.positive_similarity()
    # The largest is taken out: it cancels in the quotient, and a small sigma does not overflow.
    local_largest = similarity.max() if len(similarity) else similarity.new_full((), float("-inf"))
    values = ((similarity - pairs.ranks.largest(local_largest)) / sigma).exp()
    return 2 - values / (pairs.ranks.sum(values.sum()) / pairs.ranks.num_rows)
