"""The captioning decoder of a dual encoder, and the poolers of images before it (CoCa: Yu et al., 2022)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from open_clip.transformer import AttentionalPooler, QuickGELU
from torch import Tensor, nn

from vlm.batch import Texts
from vlm.model.attention import Block, LayerCache, initialise_blocks
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.token_likelihood import token_likelihood
from vlm.model.towers import TowerOutput


class ImagePooler(nn.Module):
    """Learned queries that attend to an image's tokens: for its embedding, and for the decoder (paper, section 3.2)."""

    def __init__(self, config: CaptionerConfig, token_width: int, width: int, embed_dim: int) -> None:
        super().__init__()
        self._layout = config.pooler
        heads = config.pooler_heads
        self.captioning = AttentionalPooler(width, token_width, heads, config.queries)
        self.captioning_norm = nn.LayerNorm(width)
        if config.pooler != "single":
            source = width if config.pooler == "cascade" else token_width
            self.contrastive = AttentionalPooler(width, source, heads, 1)
            self.contrastive_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, tokens: Float[Tensor, "batch tokens token_width"]) -> TowerOutput:
        """The image's embedding, not yet of unit norm, and its tokens for the decoder [batch, queries, width]."""
        pooled = self.captioning_norm(self.captioning(tokens))
        if self._layout == "single":
            chosen = pooled[:, 0]
        else:
            source = pooled if self._layout == "cascade" else tokens
            chosen = self.contrastive_norm(self.contrastive(source))[:, 0]
        return TowerOutput(self.projection(chosen), pooled)


@dataclass
class DecoderCache:
    """The keys and values that a decoder remembers of each layer: of the tokens so far, and of the image."""

    tokens: list[LayerCache] = field(default_factory=list)
    image: list[LayerCache] = field(default_factory=list)

    def take(self, rows: Int64[Tensor, " rows"]) -> None:
        """Go on with these sequences, in this order; images stay where they are."""
        for layer in self.tokens:
            layer.take(rows)


class NextToken(NamedTuple):
    """The logits of the token that follows each text, and the states of its tokens behind the decoder's last norm."""

    logits: Float[Tensor, "texts vocabulary"]
    states: Float[Tensor, "texts length width"]


class Vocabulary(nn.Module):
    """The map from a token state to the logits of the next token."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, size) * width**-0.5)

    def forward(
        self, states: Float[Tensor, "tokens width"], targets: Int64[Tensor, " tokens"] | None = None
    ) -> Float[Tensor, "tokens values"]:
        """The logits of all tokens; or of given ones what `token_likelihood` makes of them."""
        return states @ self.weight if targets is None else token_likelihood(states, self.weight, targets)


class Decoder(nn.Module, ABC):
    """The second half of a causal text model, which looks at images: it goes on from a text tower's token states."""

    image_projection: nn.Module
    cross_attn: nn.ModuleList
    vocabulary: Vocabulary

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks, in the order of the forward."""

    @abstractmethod
    def last_states(
        self,
        states: Float[Tensor, "texts length state_width"],
        memory: Float[Tensor, "images tokens width"] | None,
        mask: Bool[Tensor, "texts length tokens"] | None,
        cache: DecoderCache | None,
    ) -> Float[Tensor, "texts length width"]:
        """The states behind the last norm; `memory` is the projected image, None where the cache has its keys.

        Of a cache `image` has a layer for each block of `cross_attn`, and `tokens` those of an earlier call.
        """

    def forward(
        self,
        states: Float[Tensor, "texts length state_width"],
        image: Float[Tensor, "images tokens image_width"],
        *,
        mask: Bool[Tensor, "texts length tokens"] | None = None,
        targets: Int64[Tensor, "texts length"] | None = None,
        num_targets: Int64[Tensor, " texts"] | None = None,
        cache: DecoderCache | None = None,
    ) -> NextToken | Float[Tensor, "counted 2"]:
        """The tokens that follow, given those before them and the image; texts come image by image, as many for each.

        With `targets`, the `token_likelihood` of the first `num_targets` of each text, text after text; without, the
        logits of the token after the last. A cache that knows earlier tokens goes on behind them. `mask` is true where
        a token may look at an image's; one that may look at none gets exactly 0 from each attention to the image.
        """
        is_known = cache is not None and bool(cache.image)
        if cache is not None and not is_known:
            cache.image = [LayerCache() for _ in self.cross_attn]
        states = self.last_states(states, None if is_known else self.image_projection(image), mask, cache)
        if targets is None or num_targets is None:
            return NextToken(self.vocabulary(states[:, -1]), states)
        counted = torch.arange(states.shape[1], device=states.device) < num_targets[:, None]
        return self.vocabulary(states[counted], targets[counted])  # type: ignore[no-any-return]

    def text_likelihood(
        self,
        texts: Texts,
        states: Float[Tensor, "texts length state_width"],
        image_tokens: Float[Tensor, "images tokens image_width"],
    ) -> Float[Tensor, "told 2"]:
        """The `token_likelihood` of all tokens but the first of each text, text after text.

        A text is of its owner's image; without owners texts come image by image, as many for each.
        """
        if texts.owners is not None:
            image_tokens = image_tokens[texts.owners]
        last = texts.tokens.shape[1] - 1
        targets, num_targets = texts.tokens[:, 1:], texts.lengths - 1
        return self(states[:, :last], image_tokens, targets=targets, num_targets=num_targets)  # type: ignore[no-any-return]


class CaptionDecoder(Decoder):
    """The second half of a causal text model: pairs of a block over the tokens so far and one over the image's."""

    def __init__(
        self, config: CaptionerConfig, state_width: int, image_width: int, vocabulary: int, *, quick_gelu: bool = False
    ) -> None:
        super().__init__()
        width = config.width or state_width
        activation = QuickGELU if quick_gelu else nn.GELU

        def block(*, is_cross: bool) -> Block:
            return Block(
                width,
                config.heads,
                config.mlp_ratio,
                is_cross=is_cross,
                activation=activation,
                layer_scale=config.layer_scale,
            )

        self.state_projection = fitted(state_width, width)
        self.image_projection = fitted(image_width, width)
        self.resblocks = nn.ModuleList(block(is_cross=False) for _ in range(config.layers))
        self.cross_attn = nn.ModuleList(block(is_cross=True) for _ in range(config.layers))
        self.ln_final = nn.LayerNorm(width)
        self.vocabulary = Vocabulary(width, vocabulary)
        initialise_blocks(self.blocks(), width, config.layers)

    def blocks(self) -> Sequence[nn.Module]:  # noqa: D102
        return [block for pair in zip(self.resblocks, self.cross_attn, strict=True) for block in pair]

    def last_states(  # noqa: D102
        self,
        states: Float[Tensor, "texts length state_width"],
        memory: Float[Tensor, "images tokens width"] | None,
        mask: Bool[Tensor, "texts length tokens"] | None,
        cache: DecoderCache | None,
    ) -> Float[Tensor, "texts length width"]:
        x = self.state_projection(states)
        if cache is not None and not cache.tokens:
            cache.tokens = [LayerCache() for _ in self.resblocks]
        for number, (block, cross) in enumerate(zip(self.resblocks, self.cross_attn, strict=True)):
            x = block(x, causal=True, cache=None if cache is None else cache.tokens[number])
            x = cross(x, memory, mask=mask, cache=None if cache is None else cache.image[number])
        return self.ln_final(x)  # type: ignore[no-any-return]


def fitted(width: int, wanted: int) -> nn.Module:
    """A linear map to another width, where it is another."""
    return nn.Identity() if width == wanted else nn.Linear(width, wanted)
