"""Geometry while training: a few rows of the global batch, other places each time, measured on rank 0."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.distributed.row_group import RowGroup
from vlm.duration import Duration, PositiveDuration
from vlm.geometry.clouds import figures_of_clouds, tolerance
from vlm.geometry.names import HARDEST_SCORES, POSITIVE_SCORES
from vlm.geometry.negatives import hardness, score_histograms

_STRIDE = 7919  # a prime: places of one observation are not those of the next, whatever the batch


class TelemetryConfig(Config):
    """Figures of the two clouds of embeddings that are written on the way."""

    every: PositiveDuration | None = Field(default=Duration(100, "steps"), description="null: never")
    sample: int = Field(default=256, ge=2, le=16384, description="pairs of the global batch that are looked at")


@dataclass(frozen=True)
class PairSample:
    """Some pairs of a step: unit rows and, where the data has them, labels."""

    image: Float[Tensor, "pairs dim"]
    text: Float[Tensor, "pairs dim"]
    labels: Int64[Tensor, " pairs"] | None = None


def sample_pairs(local: PairSample, ranks: RowGroup, size: int, step: int) -> PairSample:
    """`size` pairs of the global batch, evenly spaced from a place that turns with `step`; all where there are fewer.

    The same pairs at any number of ranks. Collective: (W - 1) size 2 D numbers a rank at most.
    """
    count = min(size, ranks.num_rows)
    places = ((torch.arange(count) * ranks.num_rows // count + step * _STRIDE) % ranks.num_rows).sort().values
    starts = [sum(ranks.counts[:rank]) for rank in range(ranks.size + 1)]
    inside = [(places >= start) & (places < stop) for start, stop in pairwise(starts)]
    chosen = RowGroup(ranks.group, ranks.rank, tuple(int(mask.sum()) for mask in inside))
    rows = (places[inside[ranks.rank]] - ranks.local.start).to(local.image.device)
    both = chosen.gather_constant(torch.cat([local.image[rows], local.text[rows]], dim=1))
    image, text = both.chunk(2, dim=1)
    labels = None if local.labels is None else chosen.gather_constant(local.labels[rows])
    return PairSample(image, text, labels)


@torch.no_grad()
def observe(pairs: PairSample, logit_scale: float) -> dict[str, float | list[int]]:
    """The geometry of some pairs by name: numbers, and two histograms of cosines in 40 bins from -1 to 1.

    What needs more pairs than there are is left out.
    """
    image, text = pairs.image, pairs.text
    figures, _ = figures_of_clouds(image, text)
    similarities = image @ text.T
    hard = hardness(similarities, logit_scale)
    figures |= {"hardness_entropy": hard.entropy, "hardest_negative_weight": hard.hardest}
    if pairs.labels is not None:
        figures["tolerance_image"] = tolerance(image, pairs.labels)
        figures["tolerance_text"] = tolerance(text, pairs.labels)
    positives, hardest = score_histograms(similarities)
    numbers: dict[str, float | list[int]] = {name: value for name, value in figures.items() if math.isfinite(value)}
    return numbers | {POSITIVE_SCORES: positives.tolist(), HARDEST_SCORES: hardest.tolist()}
