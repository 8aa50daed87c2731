"""Captions of images by a model: pictures in, texts with their likelihood out."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vlm.errors import UserError
from vlm.generation.captions import Generated, Limits, Marks
from vlm.generation.config import GenerationConfig
from vlm.generation.prefix import Prefixes
from vlm.generation.search import KeepGoing, generate
from vlm.model.dual_encoder import DualEncoder
from vlm.objectives.counter_rng import uniforms

_DRAWING = ("top_k", "top_p")
_USUAL_LENGTH = 32


@dataclass(frozen=True)
class Caption:
    """A generated caption, and its log-likelihood under the model: of all its tokens and its end."""

    text: str
    log_likelihood: float
    num_tokens: int


class CaptionGenerator:
    """The captions of a model, always the same for the same image, whatever else is in its batch.

    Raises:
        UserError: the model has no captioning decoder, or its texts are shorter than the captions may get.
    """

    def __init__(self, model: DualEncoder, config: GenerationConfig) -> None:
        if model.decoder is None:
            raise UserError("the model has no captioning decoder (model.captioner), so it writes no captions")
        longest = model.text.context_length - 1
        max_length = min(_USUAL_LENGTH, longest) if config.max_length is None else config.max_length
        if max_length > longest:
            raise UserError(f"max_length: found {max_length}; the model's texts have {longest} tokens at most")
        if config.min_length >= max_length:
            raise UserError(f"min_length: found {config.min_length}; it is below max_length ({max_length})")
        self._model = model
        self._config = config
        self._max_length = max_length

    @property
    def options(self) -> dict[str, Any]:
        """All that the captions depend on beside the model, as JSON holds it."""
        return {**self._config.meaningful(), "max_length": self._max_length}

    @torch.no_grad()
    def captions(
        self,
        images: UInt8[Tensor, "images 3 size size"],
        ids: Int64[Tensor, " images"],
        keep_going: KeepGoing = bool,
    ) -> list[Caption]:
        """A caption of each image, in order; draws depend on the image's id, which is its own.

        Collective where the model is sharded: then `keep_going` tells whether any rank needs another step.
        """
        return self.captions_of(self._model.encode_image_and_tokens(images)[1], ids, keep_going)

    @torch.no_grad()
    def captions_of(
        self,
        image_tokens: Float[Tensor, "images tokens width"],
        ids: Int64[Tensor, " images"],
        keep_going: KeepGoing = bool,
    ) -> list[Caption]:
        """The same of images whose tokens are known."""
        prefixes = Prefixes(self._model, image_tokens)
        limits = Limits(marks_of(self._model), self._max_length, self._config.min_length)
        made = generate(prefixes, limits, self._config, self._draws(ids), keep_going)
        return [Caption(self._text(one), one.log_likelihood, len(one.tokens)) for one in made]

    def _draws(self, ids: Int64[Tensor, " images"]) -> Tensor | None:
        if self._config.method not in _DRAWING:
            return None
        return uniforms(self._config.seed, 0, ids, "caption", self._max_length)

    def _text(self, generated: Generated) -> str:
        return self._model.tokenizer.decode(generated.tokens)


def marks_of(model: DualEncoder) -> Marks:
    """The tokens that the model's texts begin and end with."""
    tokens, lengths = model.tokenizer(["a"])
    return Marks(int(tokens[0, 0]), int(tokens[0, int(lengths[0]) - 1]))
