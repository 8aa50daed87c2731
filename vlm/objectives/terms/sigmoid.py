"""The pairwise sigmoid loss of SigLIP over the pairs of all ranks."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.errors import EveryRankError
from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm


@TERMS.register("sigmoid")
class Sigmoid(PairTerm):
    """Each image and each text of the global batch is one binary question: are they a pair?

    value = 1/N sum_i [ -log sigmoid(a <x_i, y_i> + b) + sum_{j != i} log(1 + exp(a <x_i, y_j> + b)) ]

    with a the logit scale, b the logit bias, N pairs (SigLIP: Zhai et al., 2023, algorithm 1). The paper
    starts at a scale of 10 and a bias of -10, so that the many negatives weigh little at first. A sample that is in the
    batch twice is not a negative of itself; providers' negatives count in both directions, images against extra texts
    and texts against extra images.

    Raises UserError when it is evaluated with a model that has no bias.
    """

    takes_providers: ClassVar[bool] = True

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between[1:]))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        bias = step.outputs.get("logit_bias")
        if bias is None:
            raise EveryRankError(
                "objective.sigmoid: the model has no logit bias; set model.init_logit_bias"
                " (-10 in the paper, beside model.init_logit_scale: 10)"
            )
        return sigmoid(step.pairs, step.logit_scale, bias)


def sigmoid(pairs: Pairs, scale: Float[Tensor, "1"], bias: Float[Tensor, "1"]) -> Float[Tensor, ""]:
    """The loss of `Sigmoid` at a logit scale and bias."""
    positive, negatives = pairs.sigmoid_statistics(scale, bias)
    return pairs.mean(negatives - logsigmoid(positive + bias))
