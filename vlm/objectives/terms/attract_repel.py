"""Contrastive attraction and repulsion: far positives are pulled more, near negatives pushed more."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import GroupKey, PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.log_sum_exp import log_sum_exp
from vlm.similarity.softmax_moments import Softmax, Weights, softmax_means


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

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {"rbf_t": ("cost", ("rbf",))}

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
        return Needs(outputs=frozenset({"captions", *self.between}), gathered=frozenset(self.between[1:]))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        captions = step.outputs.get("captions")
        positives = None
        if self.by == "sample" and captions is not None and self.between == ("image", "text"):
            positives = captions, step.batch.owners("captions")
        return attract_repel(
            step.pairs,
            Sharpness(self.t_plus, self.t_minus, None if self.cost == "euclidean" else self.rbf_t),
            groups=None if self.by == "sample" else step.group_keys(self.by),
            positives=positives,
            factors=(self.alpha, self.beta),
            detach_weights=self.detach_weights,
        )


class Sharpness(NamedTuple):
    """The sharpness of the weights of positives and of negatives, and the RBF cost's t (None: the Euclidean cost)."""

    t_plus: float = 1.0
    t_minus: float = 1.0
    rbf_t: float | None = None


_MILD = Sharpness()


def attract_repel(
    pairs: Pairs,
    sharpness: Sharpness = _MILD,
    *,
    groups: Int64[Tensor, " rows"] | None = None,
    positives: tuple[Float[Tensor, "positives dim"], Int64[Tensor, " positives"]] | None = None,
    factors: tuple[float, float] = (1.0, 1.0),
    detach_weights: bool = False,
) -> Float[Tensor, ""]:
    """The loss of `AttractRepel`; `factors` are alpha and beta.

    With `groups`, pairs of equal keys are each other's positives. Else a pair's are its own, or of x_i all rows of
    `positives` whose owner is i.
    """
    negatives: Weights = pairs.other_samples
    if groups is None:
        attraction = _pair_attraction(pairs, positives, sharpness.t_plus, detach_weights)
    else:
        all_groups = pairs.ranks.gather_constant(groups)
        negatives = (*negatives, EqualKeys(groups, all_groups))
        same_group = Softmax(-2 * sharpness.t_plus, (EqualKeys(groups, all_groups, keep=True),), detach_weights)
        x_means, y_means = _means(pairs, same_group)
        attraction = 4 - 2 * (x_means + y_means)
    if sharpness.rbf_t is not None:
        repulsion = _rbf_repulsion(pairs, negatives, sharpness.t_minus, sharpness.rbf_t, detach_weights)
    else:
        x_means, y_means = _means(pairs, Softmax(2 * sharpness.t_minus, negatives, detach_weights))
        repulsion = 2 * (x_means + y_means) - 4
    alpha, beta = factors
    return pairs.mean((alpha * attraction + beta * repulsion) / 2)


def _pair_attraction(
    pairs: Pairs, positives: tuple[Tensor, Tensor] | None, t_plus: float, detach_weights: bool
) -> Float[Tensor, " rows"]:
    """Both directions' attraction; an x is drawn to all its positives, a y to its x."""
    cost = 2 - 2 * pairs.positive_similarity()
    if positives is None:
        return 2 * cost
    rows, owners = positives
    costs = 2 - 2 * (pairs.x[owners] * rows).sum(1)
    exponents = t_plus * (costs.detach() if detach_weights else costs)
    zeros = torch.zeros_like(cost)
    largest = zeros.scatter_reduce(0, owners, exponents.detach(), "amax")  # t+ c is never below 0
    exponentials = (exponents - largest[owners]).exp()
    total = zeros.index_add(0, owners, exponentials)
    return cost + zeros.index_add(0, owners, exponentials * costs) / total


def _means(pairs: Pairs, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Both directions' mean similarity; 1, a cost of 0, where no entry counts."""
    return softmax_means(pairs.x, pairs.y_columns, pairs.ranks, softmax, empty=1.0, matmul_dtype=pairs.matmul_dtype)


def _rbf_repulsion(
    pairs: Pairs, negatives: Weights, t_minus: float, rbf_t: float, detach_weights: bool
) -> Float[Tensor, " rows"]:
    """Both directions' log of a mean, the same for each row.

    sum_m softmax_m(u z) exp(t (2 z - 2)) = exp(L(u + 2 t) - L(u) - 2 t), L being log-sum-exps of negatives.
    """
    u, k = 2 * t_minus, 2 * rbf_t
    total = torch.zeros_like(pairs.x[:, 0])
    for costs, norms in zip(*(_logs(pairs, scale, negatives) for scale in (u + k, u)), strict=True):
        if detach_weights:  # d costs = (u + k) sum P d z, of which k are the cost's and u the weights'
            costs, norms = costs.detach().lerp(costs, k / (u + k)), norms.detach()
        some = ~norms.isneginf()
        values = (torch.where(some, costs, 0.0) - torch.where(some, norms, 0.0) - k).exp()
        sums = pairs.ranks.sum(torch.stack([torch.where(some, values, 0.0).sum(), some.sum().to(values)]))
        if sums[1] > 0:
            total = total + (sums[0] / sums[1]).log()
    return total


def _logs(pairs: Pairs, scale: float, negatives: Weights) -> tuple[Tensor, Tensor]:
    """Both directions' log-sum-exp over negatives."""
    x_lse, column_lse = log_sum_exp(
        pairs.x, pairs.y_columns, pairs.x.new_tensor([scale]), negatives, matmul_dtype=pairs.matmul_dtype
    )
    return x_lse, pairs.ranks.merge_log_sum_exp(column_lse)
