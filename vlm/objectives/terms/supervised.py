"""The supervised contrastive loss over class labels, with image and text as the two views of a sample."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.distributed.row_group import RowGroup
from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import GroupKey, PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.group_sums import group_sums
from vlm.similarity.log_sum_exp import row_log_sum_exp
from vlm.similarity.tiles import Columns


@TERMS.register("supervised")
class Supervised(PairTerm):
    """SupCon, the form with the sum outside the logarithm, over the 2N embeddings z of both modalities together.

    value = 1/(2N) sum_i -1/|P(i)| sum_{p in P(i)} log( exp(<z_i, z_p> / T) / sum_{k != i} exp(<z_i, z_k> / T) )

    with P(i) the other embeddings, of all ranks, that carry i's label; a sample's image and text are always each
    other's positive (Khosla et al., 2020, equation 2). With all labels distinct this is NT-Xent with two views (Chen et
    al., 2020). Extra negatives count as such whatever their label. O((n N + N) D) operations, O((n + N) D) memory.

    Raises UserError when it is evaluated by label on data without labels.
    """

    takes_providers: ClassVar[bool] = True

    temperature: float | None = Field(default=0.1, gt=0, le=100, description="T; null: 1 / the model's logit scale")
    by: GroupKey = Field(default="label", description="what makes positives: the same class label, sample or caption")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        scale = step.logit_scale if self.temperature is None else step.pairs.x.new_tensor([1 / self.temperature])
        return supervised(step.pairs, scale, step.group_keys(self.by))


def supervised(pairs: Pairs, scale: Float[Tensor, "1"], groups: Int64[Tensor, " rows"]) -> Float[Tensor, ""]:
    """The loss of `Supervised` at a scale of 1 / T, all embeddings of equal keys being each other's positives."""
    partner = pairs.positive_similarity()
    losses = torch.zeros_like(partner)
    means = _mean_similarities(pairs, groups, partner)
    for mean, others in zip(means, _log_sum_exp_of_others(pairs, scale), strict=True):
        # The partner's own logarithm, in which nothing is lost to 1 - 1, and how far the mean positive is from it.
        losses = losses - logsigmoid(scale * partner - others) + scale * (partner - mean)
    return pairs.mean(losses / 2)


def _mean_similarities(pairs: Pairs, groups: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """The mean similarity of each own x and each own y with its positives."""
    sums, counts = group_sums(pairs.x + pairs.y, groups, groups, pairs.ranks)
    others = sums - pairs.x - pairs.y
    x, y = (((rows * others).sum(1) + partner) / (2 * counts - 1) for rows in (pairs.x, pairs.y))
    return x, y


def _log_sum_exp_of_others(pairs: Pairs, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each own x and each own y over both embeddings of all other pairs."""
    ranks = pairs.ranks
    views = torch.cat([pairs.x, pairs.y])
    places = torch.arange(ranks.num_rows, device=views.device)
    view_places = places[ranks.local].repeat(2)
    if pairs.exchange.config.exchange == "ring" and ranks.size > 1:
        twice = RowGroup(ranks.group, ranks.rank, tuple(2 * count for count in ranks.counts))
        columns, all_places = pairs.exchange.columns(views, twice), twice.gather_constant(view_places)
    else:
        columns, all_places = Columns(torch.cat([pairs.all_x, pairs.all_y])), places.repeat(2)
    other_pairs = EqualKeys(view_places, all_places)
    both = row_log_sum_exp(views, columns, scale, (other_pairs,), matmul_dtype=pairs.matmul_dtype)
    x, y = both.chunk(2)
    for extra in pairs.extra:
        x = torch.logaddexp(x, extra.log_sum_exp(pairs.x, pairs.y_rows.kind, scale))
        y = torch.logaddexp(y, extra.log_sum_exp(pairs.y, pairs.x_rows.kind, scale))
    return x, y
