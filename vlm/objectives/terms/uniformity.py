"""Uniformity: embeddings spread over the sphere, in each modality and across both."""

import math

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.entry_weights import EqualKeys
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
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        return uniformity(step.pairs, t=self.t, x_factor=self.image, y_factor=self.text, cross_factor=self.cross)


def uniformity(
    pairs: Pairs, *, t: float = 2.0, x_factor: float = 0.5, y_factor: float = 0.5, cross_factor: float = 0.0
) -> Float[Tensor, ""]:
    """The loss of `Uniformity`, with factors of the uniformity of x, of y, and of x against y."""
    value = pairs.x.new_zeros(())
    if x_factor:
        value = value + x_factor * _log_mean_potential(pairs, pairs.x, pairs.x_columns, t)
    if y_factor:
        value = value + y_factor * _log_mean_potential(pairs, pairs.y, pairs.y_columns, t)
    if cross_factor:
        value = value + cross_factor * _log_mean_potential(pairs, pairs.x, pairs.y_columns, t)
    return pairs.samples.mean_over_groups(value)


def _log_mean_potential(pairs: Pairs, rows: Tensor, columns: Columns, t: float) -> Float[Tensor, ""]:
    """U, the same on all ranks; 0 of a single pair, which has no other."""
    ranks = pairs.ranks
    num_entries = ranks.num_rows * (ranks.num_rows - 1)
    places = torch.arange(ranks.num_rows, device=rows.device)
    others = (EqualKeys(places[ranks.local], places),)
    row_lse = row_log_sum_exp(rows, columns, rows.new_tensor([2 * t]), others, matmul_dtype=pairs.matmul_dtype)
    if not num_entries:
        return rows.sum() * 0
    largest = ranks.largest(torch.cat([row_lse.detach(), row_lse.new_full((1,), -math.inf)]).max())
    total = ranks.sum((row_lse - largest).exp().sum())
    return largest + total.log() - math.log(num_entries) - 2 * t
