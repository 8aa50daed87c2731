"""Captions that are being written: what the model remembers of them, and what it says comes next."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.model.attention import LayerCache
from vlm.model.captioner import DecoderCache, NextToken
from vlm.model.dual_encoder import DualEncoder
from vlm.model.towers import TowerOutput


class Prefixes:
    """The beginnings of captions, image by image as many for each, and the keys and values that both halves remember.

    A text tower that remembers nothing reads each beginning again.
    """

    def __init__(self, model: DualEncoder, image_tokens: Float[Tensor, "images tokens width"]) -> None:
        assert model.decoder is not None
        self._text, self._decoder = model.text, model.decoder
        self._image_tokens = image_tokens
        self._tokens = torch.zeros(len(image_tokens), 0, dtype=torch.long, device=image_tokens.device)
        self._text_cache: list[LayerCache] = []
        self._cache = DecoderCache()

    def __len__(self) -> int:
        """The images."""
        return len(self._image_tokens)

    @property
    def device(self) -> torch.device:
        """Where tokens are."""
        return self._tokens.device

    def append(self, tokens: Int64[Tensor, " captions"]) -> NextToken:
        """Add a token to each; the logits of the next one, and this one's state."""
        self._tokens = torch.cat([self._tokens, tokens[:, None]], 1)
        states = self._states()
        return self._decoder(states, self._image_tokens, cache=self._cache)  # type: ignore[no-any-return]

    def take(self, rows: Int64[Tensor, " captions"]) -> None:
        """Go on with these captions, image by image; one may come several times, and all images stay."""
        self._tokens = self._tokens[rows]
        self._cache.take(rows)
        for layer in self._text_cache:
            layer.take(rows)

    def _states(self) -> Tensor:
        length = self._tokens.shape[1]
        if self._text.remembers:
            lengths = torch.ones_like(self._tokens[:, 0])
            made = self._text(self._tokens[:, -1:], lengths, cache=self._text_cache)
        else:
            made = self._text(self._tokens, torch.full_like(self._tokens[:, 0], length))
        assert isinstance(made, TowerOutput)
        return made.tokens[:, -1:]
