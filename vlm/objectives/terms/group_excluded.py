"""CLIP's loss with pairs of the same group left out of each other's denominators."""

from typing import ClassVar, Literal

from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.entry_weights import EqualKeys


@TERMS.register("group_excluded")
class GroupExcluded(PairTerm):
    """The symmetric InfoNCE loss whose negatives are the pairs of other groups only.

    value = -1/(2N) sum_i [ log(e_ii / (e_ii + sum_j e_ij)) + log(e_ii / (e_ii + sum_j e_ji)) ],  j: g_j != g_i

    with e_ij = exp(a <x_i, y_j>), a the logit scale and g the group: what is alike by construction is not pushed apart
    (Chaitanya et al., 2020, their variant without extra positives; there, slices of the same part of other volumes).
    With all groups distinct this is `clip`; with one group for all it is 0. Providers' negatives count for every group.

    Raises UserError when it is evaluated by label on data without labels.
    """

    takes_providers: ClassVar[bool] = True

    by: Literal["label", "caption"] = Field(
        default="label", description="what makes a group: the same class label, or the same caption text"
    )

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between[1:]))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        return group_excluded(step.pairs, step.logit_scale, step.group_keys(self.by))


def group_excluded(pairs: Pairs, scale: Float[Tensor, "1"], groups: Int64[Tensor, " rows"]) -> Float[Tensor, ""]:
    """The loss of `GroupExcluded`, pairs of equal keys being one group."""
    other_groups = EqualKeys(groups, pairs.ranks.gather_constant(groups))
    # A sample that is in the batch twice may come with two captions.
    negatives = (*pairs.other_samples, other_groups)
    positive, x_negatives, y_negatives = pairs.infonce_statistics(scale, negatives)
    return pairs.mean(-(logsigmoid(positive - x_negatives) + logsigmoid(positive - y_negatives)) / 2)
