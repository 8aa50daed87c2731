"""Language modelling over documents in which images stand between texts."""

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from vlm.batch import DOCUMENTS, Batch, Documents
from vlm.objectives.local_part import LocalPart
from vlm.objectives.registry import TERMS
from vlm.objectives.term import LocalTerm, Needs
from vlm.outputs import PAIR, likelihood_of


@TERMS.register("interleaved")
class Interleaved(LocalTerm):
    """Mean over the tokens t of the global batch's documents of -log p(t | tokens before t, images that t sees).

    Which images a token sees is the data's to say (`data.documents.images_seen`): the last one before it (Flamingo:
    Alayrac et al., 2022), or all before it. Documents are in this loss alone, and in no contrastive one (COSMO: Wang et
    al., 2024). Told are all tokens but a document's first and those of `data.documents.image_text`. Label smoothing is
    that of `caption`.
    """

    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the uniform distribution in a label")

    def needs(self) -> Needs:
        """The tokens' likelihoods, beside both embeddings."""
        return Needs(outputs=PAIR | {likelihood_of(DOCUMENTS)}, batch_parts=frozenset({DOCUMENTS}))

    def count(self, batch: Batch) -> int:
        """The tokens that are told."""
        return int(_told(batch).sum())

    def __call__(self, part: LocalPart) -> Float[Tensor, ""]:
        """The sum over the told tokens of a micro-batch."""
        likelihood = part.outputs[likelihood_of(DOCUMENTS)][_told(part.batch)].sum(0)
        loss: Tensor = -(1 - self.label_smoothing) * likelihood[0] - self.label_smoothing * likelihood[1]
        return loss


def _told(batch: Batch) -> Bool[Tensor, " tokens"]:
    """Whether each token that has a likelihood is told, document after document."""
    documents = batch.parts[DOCUMENTS]
    assert isinstance(documents, Documents)
    places = torch.arange(1, documents.tokens.shape[1], device=documents.tokens.device)
    return documents.told[:, 1:][places < documents.lengths[:, None]]
