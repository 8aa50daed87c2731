"""Documents under a captioning decoder: the images that each text token sees, and the likelihoods of the tokens."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.batch import BatchPart, Documents, Texts
from vlm.model.captioner import Decoder


@runtime_checkable
class Captioner(Protocol):
    """A model with a captioning decoder."""

    decoder: Decoder | None

    def text_features(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """The text tower's output, and the states of all tokens."""


class DocumentMemory(NamedTuple):
    """The tokens of each document's images side by side, filled up with zeros, and a mask: where a text token looks."""

    tokens: Float[Tensor, "documents image_tokens width"]
    mask: Bool[Tensor, "documents length image_tokens"]


def document_likelihood(
    model: Captioner,
    documents: Documents,
    image_tokens: Float[Tensor, "images tokens width"],
    others: BatchPart,
) -> Float[Tensor, "told 2"]:
    """The `token_likelihood` of all tokens but the first of each document, which go through the tower by themselves.

    Without any, as on a rank that has none, one of the `others` is a document that counts for nothing: every rank calls
    the same modules, and each parameter gets its gradient.
    """
    assert model.decoder is not None
    assert isinstance(others, Texts)
    num_documents = len(documents.lengths)
    if not num_documents:
        documents = without_images(others.take(0, 1))
    states = model.text_features(documents.tokens, documents.lengths)[1]
    assert states is not None
    memory = document_memory(documents, image_tokens)
    last = documents.tokens.shape[1] - 1
    made: Tensor = model.decoder(
        states[:, :last],
        memory.tokens,
        mask=memory.mask[:, :last],
        targets=documents.tokens[:, 1:],
        num_targets=documents.lengths - 1,
    )
    return made[: len(made) if num_documents else 0]  # always a slice: FSDP2 has to meet the same graph on all ranks


def document_memory(documents: Documents, image_tokens: Float[Tensor, "images tokens width"]) -> DocumentMemory:
    """What the decoder looks at; images come document after document."""
    counts, device = documents.num_images, image_tokens.device
    most = max(1, int(counts.max()))
    rows = torch.arange(len(counts), device=device).repeat_interleave(counts)
    places = torch.arange(len(image_tokens), device=device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    room = image_tokens.new_zeros(len(counts), most, *image_tokens.shape[1:])
    numbers = torch.arange(most, device=device)
    seen = (documents.seen_from[..., None] <= numbers) & (numbers < documents.seen_to[..., None])
    return DocumentMemory(
        room.index_put((rows, places), image_tokens).flatten(1, 2), seen.repeat_interleave(image_tokens.shape[1], 2)
    )


def without_images(texts: Texts) -> Documents:
    """Texts as documents that show nothing, and of which nothing is to be told."""
    nothing = torch.zeros_like(texts.tokens)
    return Documents(
        texts.tokens,
        texts.lengths,
        told=nothing.bool(),
        seen_from=nothing,
        seen_to=nothing,
        num_images=torch.zeros_like(texts.lengths),
    )
