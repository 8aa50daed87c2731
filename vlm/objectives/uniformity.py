"""Uniformity: embeddings spread over the sphere, in each modality and across both."""

import math

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.entries import EqualKeys
from vlm.similarity.log_sum_exp import row_log_sum_exp
from vlm.similarity.tiles import Columns


@TERMS.register("uniformity")
class Uniformity(PairTerm):
    """Logarithms of mean Gaussian potentials of the *global* batch, in and across modalities.

    value = a U(x, x) + b U(y, y) + c U(x, y),  U(u, v) = log mean_{i != j} exp(-t |u_i - v_j|^2)

    with a, b, c the fields `image`, `text`, `cross`, and x, y of length 1, so that U is between -4t and 0 and uses
    |u - v|^2 = 2 - 2 <u, v>. The mean of ranks' or micro-batches' logarithms is another number: means over fewer pairs.
    (Wang & Isola, 2020, L_uniform.) The defaults are L_uniform of Fahim et al., 2024; `cross: 1` adds their L_xuniform.
    Entries are left out by place: a
    sample that is in the batch twice counts as two. With groups of ranks, the mean over pairs of their groups' values.
    """

    t: float = Field(default=2.0, gt=0, le=100, description="inverse width of the potential")
    image: float = Field(default=0.5, ge=0, le=1e6, description="factor of the images' uniformity")
    text: float = Field(default=0.5, ge=0, le=1e6, description="factor of the texts' uniformity")
    cross: float = Field(
        default=0.0, ge=0, le=1e6, description="factor of the uniformity of images against other pairs' texts"
    )

    def needs(self) -> Needs:  # noqa: D102
        return Needs(gathered=frozenset({"image", "text"}))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        value = pairs.image.new_zeros(())
        if self.image:
            value = value + self.image * _log_mean_potential(pairs, pairs.image, pairs.gathered.image_columns, self.t)
        if self.text:
            value = value + self.text * _log_mean_potential(pairs, pairs.text, pairs.gathered.text_columns, self.t)
        if self.cross:
            value = value + self.cross * _log_mean_potential(pairs, pairs.image, pairs.gathered.text_columns, self.t)
        return pairs.share_of_group(value)


def _log_mean_potential(pairs: Pairs, rows: Tensor, columns: Columns, t: float) -> Float[Tensor, ""]:
    """U, the same on all ranks; 0 of a single pair, which has no other."""
    ranks = pairs.ranks
    num_entries = ranks.num_rows * (ranks.num_rows - 1)
    places = torch.arange(ranks.num_rows, device=rows.device)
    others = (EqualKeys(places[ranks.own], places),)
    of_rows = row_log_sum_exp(rows, columns, rows.new_tensor([2 * t]), others, product=pairs.exchange.product)
    if not num_entries:
        return rows.sum() * 0
    largest = ranks.largest(torch.cat([of_rows.detach(), of_rows.new_full((1,), -math.inf)]).max())
    total = ranks.sum((of_rows - largest).exp().sum())
    return largest + total.log() - math.log(num_entries) - 2 * t
