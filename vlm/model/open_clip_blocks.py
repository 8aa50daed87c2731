"""Our own blocks in the networks of open_clip, and the token states of its text transformers, one after the other."""

from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int64
from open_clip.transformer import Transformer
from torch import Tensor, nn

from vlm.model.attention import Block, LayerCache
from vlm.model.length_groups import LengthGroups


class _OwnBlock(Block):
    """A block that open_clip's transformer calls with its additive mask; it goes on from a cache, and takes groups."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        k_x: None = None,
        v_x: None = None,
        attn_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        groups: LengthGroups | None = None,
    ) -> Tensor:
        assert k_x is v_x is None
        if groups is not None:
            return super().forward(x, groups=groups)
        if cache is not None:
            return super().forward(x, causal=True, cache=cache)
        if attn_mask is not None and attn_mask.ndim == 3:  # [batch heads, queries, keys]
            attn_mask = attn_mask.unflatten(0, (len(x), self.attn.heads))
        return super().forward(x, mask=attn_mask)

    def get_weight_dtype(self) -> torch.dtype:
        """The type of its weights, which open_clip asks for."""
        return self.attn.in_proj_weight.dtype


def use_own_blocks(transformer: Transformer) -> None:
    """Put our own blocks in the place of open_clip's usual kind, with their parameters; they compute what those did."""
    with suppress(ValueError):
        blocks = [Block.of_open_clip(block, _OwnBlock) for block in transformer.resblocks]
        transformer.resblocks = nn.ModuleList(blocks)


def has_own_blocks(transformer: Transformer) -> bool:
    """Whether all blocks go on from a cache, and take texts in groups."""
    return all(isinstance(block, _OwnBlock) for block in transformer.resblocks)


def next_states(
    tower: Any, ids: Int64[Tensor, "batch length"], cache: list[LayerCache]
) -> Float[Tensor, "batch length width"]:
    """The states of tokens behind those that the cache knows, which knows them too from then on."""
    if not cache:
        cache.extend(LayerCache() for _ in tower.transformer.resblocks)
    start = cache[0].length
    states = tower.token_embedding(ids) + tower.positional_embedding[start : start + ids.shape[1]]
    for block, layer in zip(tower.transformer.resblocks, cache, strict=True):
        states = block(states, cache=layer)
    # open_clip tells states behind the norm, unless a class token alone is normed.
    return states if getattr(tower, "cls_emb", None) is not None else tower.ln_final(states)  # type: ignore[no-any-return]
