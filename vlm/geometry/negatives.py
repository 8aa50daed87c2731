"""The negatives as the contrastive loss weighs them: how concentrated their weights are, and how scores are spread."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Hardness:
    """Means over rows: the entropy of a row's weights of its negatives in nats, and the weight of the hardest."""

    entropy: float
    hardest: float


def hardness(similarities: Float[Tensor, "rows columns"], scale: float) -> Hardness:
    """Of the weights exp(a s_ij) / sum_{k != i} exp(a s_ik) with which negatives push, pairs on the diagonal.

    (Wang & Liu, 2021, equation 5: their relative penalty.) A large logit scale a concentrates them on the hardest: an
    entropy of 0, against the logarithm of their number where all push alike. NaN for fewer than two rows.
    """
    if similarities.shape[1] < 2:
        return Hardness(math.nan, math.nan)
    logits = (scale * similarities).fill_diagonal_(-math.inf)
    weights = logits.softmax(1)
    return Hardness(float(torch.special.entr(weights).sum(1).mean()), float(weights.amax(1).mean()))


def score_histograms(
    similarities: Float[Tensor, "rows columns"], num_bins: int = 40
) -> tuple[Int64[Tensor, " bins"], Int64[Tensor, " bins"]]:
    """Counts of cosines from -1 to 1 in equal bins: of the positives, and of each row's hardest negative."""
    positives = similarities.diagonal()
    negatives = similarities.clone().fill_diagonal_(-math.inf)
    hardest = negatives.amax(1) if similarities.shape[1] > 1 else positives[:0]
    return _counts(positives, num_bins), _counts(hardest, num_bins)


def _counts(cosines: Tensor, num_bins: int) -> Tensor:
    bins = ((cosines.clamp(-1, 1) + 1) / 2 * num_bins).long().clamp(max=num_bins - 1)
    return torch.bincount(bins, minlength=num_bins)
