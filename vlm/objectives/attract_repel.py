"""Contrastive attraction and repulsion: far positives are pulled more, near negatives pushed more."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import GroupKey, Pairs, group_keys
from vlm.objectives.registry import TERMS
from vlm.objectives.term import Needs, PairTerm
from vlm.outputs import PAIR
from vlm.similarity.entries import EqualKeys
from vlm.similarity.log_sum_exp import log_sum_exp
from vlm.similarity.softmax_mean import Softmax, Weights, softmax_means


@TERMS.register("attract_repel")
class AttractRepel(PairTerm):
    """The cost of positives under their softmax, less the cost of negatives under theirs.

    With c(a, b) = ||a - b||^2 = 2 - 2 <a, b>, for a query x with positives p_k and negatives n_m:

        attraction = sum_k w+_k c(x, p_k),     w+ = softmax_k(t+ c(x, p_k))
        repulsion  = - sum_m w-_m c(x, n_m),   w- = softmax_m(- t- c(x, n_m))
        value = mean over both directions and all queries of (alpha attraction + beta repulsion)

    and with the RBF cost: repulsion = log mean_x sum_m w-_m exp(-t c(x, n_m)), the mean being over the queries of all
    ranks (of a group). (Contrastive Attraction and Contrastive Repulsion, Zheng et al., 2021; without gradient through
    the weights it is the form of their large-scale code.) With one positive, attraction is alignment. A query without
    negatives is not repelled.
    """

    by: GroupKey = Field(
        default="sample",
        description="what belongs together: sample (a pair; an image with all its captions where the batch brings "
        "several), caption (equal captions), label (equal class)",
    )
    t_plus: float = Field(
        default=1.0, ge=0, le=1000, description="sharpness of the weights of positives; 0: plain mean"
    )
    t_minus: float = Field(
        default=1.0, ge=0, le=1000, description="sharpness of the weights of negatives; 0: plain mean"
    )
    alpha: float = Field(default=1.0, ge=0, le=1e6, description="weight of attraction")
    beta: float = Field(default=1.0, ge=0, le=1e6, description="weight of repulsion")
    cost: Literal["euclidean", "rbf"] = Field(default="euclidean", description="cost of negatives")
    rbf_t: float = Field(default=2.0, gt=0, le=20, description="t of the RBF cost exp(-t c)")
    detach_weights: bool = Field(default=False, description="no gradient through the softmax weights")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=PAIR | {"captions"}, gathered=frozenset({"text"}))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        negatives: Weights = pairs.gathered.other_samples
        if self.by == "sample":
            attraction = self._pair_attraction(pairs)
        else:
            own = group_keys(pairs, self.by)
            everyone = pairs.ranks.gather_constant(own)
            negatives = (*negatives, EqualKeys(own, everyone))
            attraction = self._group_attraction(pairs, EqualKeys(own, everyone, keep=True))
        repulsion = self._rbf_repulsion(pairs, negatives) if self.cost == "rbf" else self._repulsion(pairs, negatives)
        return pairs.share((self.alpha * attraction + self.beta * repulsion) / 2)

    def _pair_attraction(self, pairs: Pairs) -> Float[Tensor, " rows"]:
        """Both directions' attraction; an image is drawn to all its captions, a text to its image."""
        cost = 2 - 2 * pairs.positive_similarity()
        captions = pairs.outputs.get("captions")
        if captions is None:
            return 2 * cost
        owners = pairs.batch.owners("captions")
        costs = 2 - 2 * (pairs.image[owners] * captions).sum(1)
        steps = self.t_plus * (costs.detach() if self.detach_weights else costs)
        zeros = torch.zeros_like(cost)
        largest = zeros.scatter_reduce(0, owners, steps.detach(), "amax")  # t+ c is never below 0
        exponentials = (steps - largest[owners]).exp()
        total = zeros.index_add(0, owners, exponentials)
        return cost + zeros.index_add(0, owners, exponentials * costs) / total

    def _group_attraction(self, pairs: Pairs, positives: EqualKeys) -> Float[Tensor, " rows"]:
        of_images, of_texts = self._means(pairs, -2 * self.t_plus, (positives,))
        return 4 - 2 * (of_images + of_texts)

    def _repulsion(self, pairs: Pairs, negatives: Weights) -> Float[Tensor, " rows"]:
        of_images, of_texts = self._means(pairs, 2 * self.t_minus, negatives)
        return 2 * (of_images + of_texts) - 4

    def _means(self, pairs: Pairs, sharpness: float, weights: Weights) -> tuple[Tensor, Tensor]:
        """Both directions' mean similarity; 1, a cost of 0, where no entry counts."""
        return softmax_means(
            pairs.image,
            pairs.gathered.text_columns,
            pairs.ranks,
            Softmax(sharpness, weights, constant=self.detach_weights),
            empty=1.0,
            product=pairs.exchange.product,
        )

    def _rbf_repulsion(self, pairs: Pairs, negatives: Weights) -> Float[Tensor, " rows"]:
        """Both directions' log of a mean, the same for each row.

        sum_m softmax_m(u z) exp(t (2 z - 2)) = exp(L(u + 2 t) - L(u) - 2 t), L being log-sum-exps of negatives.
        """
        u, k = 2 * self.t_minus, 2 * self.rbf_t
        total = torch.zeros_like(pairs.image[:, 0])
        for costs, norms in zip(*(self._logs(pairs, scale, negatives) for scale in (u + k, u)), strict=True):
            if self.detach_weights:  # d costs = (u + k) sum P d z, of which k are the cost's and u the weights'
                costs, norms = costs.detach().lerp(costs, k / (u + k)), norms.detach()
            some = ~norms.isneginf()
            values = (torch.where(some, costs, 0.0) - torch.where(some, norms, 0.0) - k).exp()
            sums = pairs.ranks.sum(torch.stack([torch.where(some, values, 0.0).sum(), some.sum().to(values)]))
            if sums[1] > 0:
                total = total + (sums[0] / sums[1]).log()
        return total

    def _logs(self, pairs: Pairs, scale: float, negatives: Weights) -> tuple[Tensor, Tensor]:
        """Both directions' log-sum-exp over negatives."""
        rows, parts = log_sum_exp(
            pairs.image,
            pairs.gathered.text_columns,
            pairs.image.new_tensor([scale]),
            negatives,
            product=pairs.exchange.product,
        )
        return rows, pairs.ranks.merge_log_sum_exp(parts)
