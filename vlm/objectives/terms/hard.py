"""The hard contrastive loss: only the most similar negatives are in the denominator."""

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.entry_weights import AtLeast, EntryWeights
from vlm.similarity.thresholds import upper_thresholds

_Weights = tuple[EntryWeights, ...]


@TERMS.register("hard")
class Hard(PairTerm):
    """The symmetric InfoNCE loss over each row's hardest negatives (Wang & Liu, 2021, hard contrastive loss).

    value = -1/(2N) sum_i [ log(e_ii / (e_ii + sum_j e_ij)) + log(e_ii / (e_ii + sum_k e_ki)) ]

    over the j != i with s_ij >= u_i and the k != i with s_ki >= v_i; s_ij = <x_i, y_j>, e_ij = exp(a s_ij), a the logit
    scale, and u_i, v_i the upper quantiles of image i's and of text i's negatives in the global batch: at least one
    of them counts, and all that tie with the last. In `clip` a low temperature is what makes hard negatives count; here
    a higher one does. With a share of 1 this is `clip`. The choice carries no gradient; providers' negatives always
    count.

    Beside what `clip` costs there are two more products of all pairs, without gradient, and a selection of the quantile
    in each row of both: on a CPU 2.4 to 3.2 times the time of `clip` at a dimension of 512, 8 to 12 times at 32
    (benchmarks/loss/hard.py). All embeddings are in memory with a ring too.
    """

    takes_providers: ClassVar[bool] = True
    picks_pairs: ClassVar[bool] = True

    hardest: float = Field(default=0.1, gt=0, le=1, description="share of a row's negatives that count")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between[1:]))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        return hard(step.pairs, step.logit_scale, hardest=self.hardest)


def hard(pairs: Pairs, scale: Float[Tensor, "1"], *, hardest: float = 0.1) -> Float[Tensor, ""]:
    """The loss of `Hard`."""
    positive, x_negatives, y_negatives = pairs.infonce_statistics(scale, *_hardest(pairs, scale, hardest))
    return pairs.mean(-(logsigmoid(positive - x_negatives) + logsigmoid(positive - y_negatives)) / 2)


def _hardest(pairs: Pairs, scale: Tensor, fraction: float) -> tuple[_Weights, _Weights]:
    """The negatives of each own x, and of each y of the batch."""
    others = pairs.other_samples
    if fraction == 1:
        return others, others
    # Logits as the tiles have them: x carries the scale, y is what low precision left of it on its way.
    x, all_y = (pairs.x * scale).detach(), pairs.all_y.detach()
    x_thresholds = upper_thresholds(x, all_y, fraction, others, matmul_dtype=pairs.matmul_dtype)
    all_x = pairs.ranks.gather_constant(x)
    y_thresholds = upper_thresholds(all_y[pairs.ranks.local], all_x, fraction, others, matmul_dtype=pairs.matmul_dtype)
    all_y_thresholds = pairs.ranks.gather_constant(y_thresholds)
    return (*others, AtLeast(x_thresholds)), (*others, AtLeast(all_y_thresholds, by_column=True))
