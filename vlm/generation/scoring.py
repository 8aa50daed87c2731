"""What a model says of texts under images: how likely each is, and how near."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.model.dual_encoder import DualEncoder


class TextScore(NamedTuple):
    """A text's log-likelihood under an image with that of its end, its tokens without marks, and the cosine of both."""

    log_likelihood: float
    num_tokens: int
    cosine: float


@torch.no_grad()
def score_texts(
    model: DualEncoder,
    embedding: Float[Tensor, "images dim"],
    image_tokens: Float[Tensor, "images tokens width"],
    texts: Sequence[str],
) -> list[TextScore]:
    """The scores of one text for each image, as `DualEncoder.encode_image_and_tokens` tells the images."""
    tokens, lengths = (part.to(embedding.device) for part in model.tokenizer(texts))
    text_embedding, states = model.encode_text_and_states(tokens, lengths)
    likelihood = model.likelihood_of_states(image_tokens, states, tokens, lengths)
    cosines = (embedding * text_embedding).sum(1)
    rows = zip(likelihood.tolist(), (lengths - 2).tolist(), cosines.tolist(), strict=True)
    return [TextScore(*row) for row in rows]
