"""The hard contrastive loss: only the most similar negatives are in the denominator."""

from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.entries import AtLeast, EntryWeights
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

    hardest: float = Field(default=0.1, gt=0, le=1, description="share of a row's negatives that count")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(gathered=frozenset({"text"}))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        positive, of_images, of_texts = pairs.logits(pairs.logit_scale, *self._hardest(pairs))
        return pairs.share(-(logsigmoid(positive - of_images) + logsigmoid(positive - of_texts)) / 2)

    def _hardest(self, pairs: Pairs) -> tuple[_Weights, _Weights]:
        """The negatives of each own image, and of each text of the batch."""
        others = pairs.gathered.other_samples
        if self.hardest == 1:
            return others, others
        # Logits as the tiles have them: the images carry the scale, the texts what the wire left of them.
        images, texts = (pairs.image * pairs.logit_scale).detach(), pairs.gathered.text.detach()
        product = pairs.exchange.product
        of_images = upper_thresholds(images, texts, self.hardest, others, product=product)
        all_images = pairs.ranks.gather_constant(images)
        of_texts = upper_thresholds(texts[pairs.ranks.own], all_images, self.hardest, others, product=product)
        of_all_texts = pairs.ranks.gather_constant(of_texts)
        return (*others, AtLeast(of_images)), (*others, AtLeast(of_all_texts, of_columns=True))
