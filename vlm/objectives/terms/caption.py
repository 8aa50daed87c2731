"""Captioning: the likelihood of each token of a caption, given those before it and the image."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.batch import Batch, Texts
from vlm.objectives.local_part import LocalPart
from vlm.objectives.registry import TERMS
from vlm.objectives.term import LocalTerm, Needs
from vlm.outputs import PAIR, likelihood_of


@TERMS.register("caption")
class Caption(LocalTerm):
    """Mean over the global batch's tokens t of -log p(t | tokens before t, image) (CoCa: Yu et al., 2022, eq. 3).

    All tokens of a caption but its first are told, the end token among them, none of the padding. The mean is over
    tokens, not over captions; authors' and open_clip's code take that of each rank, which differs where ranks have
    unequal numbers. Label smoothing e is that of Szegedy et al., 2016: (1 - e) times the above, and e times the mean
    of -log p over the vocabulary.

    CoCa's weights are 1 for the contrastive loss, the *sum* of both directions in the paper, and 2 for this one.
    `clip` is the mean of both directions, as in open_clip, whose recipes have weights of 1 and 2 all the same.
    """

    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the uniform distribution in a label")
    captions: Literal["one", "all"] = Field(
        default="one", description="of a sample: the one that is its text, or all, which the data then has to bring"
    )

    @property
    def _part(self) -> str:
        return "text" if self.captions == "one" else "captions"

    def needs(self) -> Needs:
        """The tokens' likelihoods, beside both embeddings."""
        return Needs(outputs=PAIR | {likelihood_of(self._part)}, batch_parts=frozenset({self._part}))

    def count(self, batch: Batch) -> int:
        """The tokens that are told."""
        texts = batch.parts[self._part]
        assert isinstance(texts, Texts)
        return int((texts.lengths - 1).sum())

    def __call__(self, part: LocalPart) -> Float[Tensor, ""]:
        """The sum over the tokens of a micro-batch."""
        likelihood = part.outputs[likelihood_of(self._part)].sum(0)
        loss: Tensor = -(1 - self.label_smoothing) * likelihood[0] - self.label_smoothing * likelihood[1]
        return loss
