"""The pairwise sigmoid loss of SigLIP over the pairs of all ranks."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.errors import EveryRankError
from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
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
        return Needs(gathered=frozenset({"text"}))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        scale, bias = pairs.logit_scale, pairs.outputs.get("logit_bias")
        if bias is None:
            raise EveryRankError(
                "objective.sigmoid: the model has no logit bias; set model.init_logit_bias"
                " (-10 in the paper, beside model.init_logit_scale: 10)"
            )
        positive, negatives = pairs.softplus_logits(scale, bias)
        return pairs.share(negatives - logsigmoid(positive + bias))
