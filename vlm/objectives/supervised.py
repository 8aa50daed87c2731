"""The supervised contrastive loss over class labels, with image and text as the two views of a sample."""

from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import GroupKey, Pairs, group_keys
from vlm.objectives.registry import TERMS
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.collectives import RowGroup
from vlm.similarity.entries import EqualKeys
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
        return Needs(gathered=frozenset({"image", "text"}))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        scale = pairs.logit_scale if self.temperature is None else pairs.image.new_tensor([1 / self.temperature])
        partner = pairs.positive_similarity()
        means = self._mean_similarities(pairs, partner)
        losses = torch.zeros_like(partner)
        for mean, others in zip(means, _log_sum_exp_of_others(pairs, scale), strict=True):
            # The partner's own logarithm, in which nothing is lost to 1 - 1, and how far the mean positive is from it.
            losses = losses - logsigmoid(scale * partner - others) + scale * (partner - mean)
        return pairs.share(losses / 2)

    def _mean_similarities(self, pairs: Pairs, partner: Tensor) -> tuple[Tensor, Tensor]:
        """Of each own image and each own text the mean similarity with its positives."""
        keys = group_keys(pairs, self.by)
        sums, counts = group_sums(pairs.image + pairs.text, keys, keys, pairs.ranks)
        others = sums - pairs.image - pairs.text
        image, text = (((rows * others).sum(1) + partner) / (2 * counts - 1) for rows in (pairs.image, pairs.text))
        return image, text


def _log_sum_exp_of_others(pairs: Pairs, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of each own image and each own text the log-sum-exp over both embeddings of all other pairs."""
    ranks = pairs.ranks
    views = torch.cat([pairs.image, pairs.text])
    places = torch.arange(ranks.num_rows, device=views.device)
    own_places = places[ranks.own].repeat(2)
    if pairs.exchange.config.exchange == "ring" and ranks.size > 1:
        twice = RowGroup(ranks.group, ranks.rank, tuple(2 * count for count in ranks.counts))
        columns, all_places = pairs.exchange.columns(views, twice), twice.gather_constant(own_places)
    else:
        columns, all_places = Columns(torch.cat([pairs.gathered.image, pairs.gathered.text])), places.repeat(2)
    other_pairs = EqualKeys(own_places, all_places)
    both = row_log_sum_exp(views, columns, scale, (other_pairs,), product=pairs.exchange.product)
    image, text = both.chunk(2)
    for extra in pairs.extra:
        image = torch.logaddexp(image, extra.log_sum_exp(pairs.image, "text", scale))
        text = torch.logaddexp(text, extra.log_sum_exp(pairs.text, "image", scale))
    return image, text
