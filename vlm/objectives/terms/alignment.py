"""Alignment: the distance between an image and its text."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import PairTerm


@TERMS.register("alignment")
class Alignment(PairTerm):
    """The mean distance of pairs to the power of alpha (Wang & Isola, 2020, L_align; Fahim et al., 2024).

    value = 1/N sum_i |x_i - y_i|^alpha, which is 2 - 2 mean <x_i, y_i> at alpha = 2
    """

    alpha: float = Field(default=2.0, ge=1, le=100, description="power of the distance")

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        return alignment(step.pairs, alpha=self.alpha)


def alignment(pairs: Pairs, *, alpha: float = 2.0) -> Float[Tensor, ""]:
    """The loss of `Alignment`."""
    squared = (pairs.x - pairs.y).square().sum(1)
    if alpha != 2:
        # A power below 2 has no gradient at a distance of 0; there it gets 0.
        some = squared != 0
        squared = torch.where(some, torch.where(some, squared, 1.0) ** (alpha / 2), 0.0)
    return pairs.mean(squared)
