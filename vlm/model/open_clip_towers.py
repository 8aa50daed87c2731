"""open_clip's image and text towers, the causal text tower running at the length of its batch."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg, _build_text_tower, _build_vision_tower
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor, nn

from vlm.errors import UserError, reason
from vlm.model.attention import LayerCache
from vlm.model.clean_configuration import CONFIG
from vlm.model.foreign import ForeignFiles, folder_of
from vlm.model.length_groups import LengthGroups
from vlm.model.lock import projection_of
from vlm.model.open_clip_blocks import has_own_blocks, next_states, use_own_blocks
from vlm.model.open_clip_fields import CORRECT_CLS_MASK
from vlm.model.patch_dropout import use_own_patch_dropout
from vlm.model.tokenizer import Tokenizer
from vlm.model.towers import TextTower, TowerOutput
from vlm.model.transformers_models import load, require_weights

# What open_clip, timm and torch raise about impossible sizes.
_BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)


class CausalTextTower(TextTower):
    """open_clip's causal text transformer (Radford et al., 2021), pooled at the end token, at any length.

    What follows the end token cannot reach it, so a batch needs no padding beyond its longest text. This module owns
    the parameters, under open_clip's names: engines that shard them gather them when their owner's forward runs.
    """

    attn_mask: Tensor

    def __init__(self, tower: TextTransformer, context_length: int, pad_id: int) -> None:
        super().__init__(context_length, pad_id)
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection
        self.register_buffer("attn_mask", tower.attn_mask, persistent=False)
        self._pool_type = tower.pool_type
        self._eos_id = tower.eos_id
        self._emits_tokens = False
        use_own_blocks(self.transformer)

    @property
    def may_shorten(self) -> bool:
        """Causal and pooled at the end token: always."""
        return True

    def emit_tokens(self) -> None:  # noqa: D102
        self._emits_tokens = True

    @property
    def remembers(self) -> bool:  # noqa: D102
        return has_own_blocks(self.transformer)

    def forward(
        self,
        tokens: Int64[Tensor, "batch length"],
        lengths: Int64[Tensor, " batch"],
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "batch dim"] | TowerOutput:
        """Embeddings of texts of any length up to the context length."""
        length = tokens.shape[1]
        ids = self.padded(tokens, lengths, length)
        if cache is not None:
            states = next_states(self, ids, cache)
            return TowerOutput(states[:, -1], states)
        if self.training and self.groups_texts and has_own_blocks(self.transformer):
            return self._in_groups(ids, LengthGroups.of(lengths, self.token_embedding.embedding_dim))
        hidden = self.token_embedding(ids) + self.positional_embedding[:length]
        hidden = self.transformer(hidden, attn_mask=self.attn_mask[:length, :length])
        if self._emits_tokens:
            states = self.ln_final(hidden)
            return TowerOutput(_projected(self._pooled(states, ids), self.text_projection), states)
        # The norm works token by token, so it may follow the pooling.
        pooled = self.ln_final(self._pooled(hidden, ids))
        return _projected(pooled, self.text_projection)

    def _in_groups(self, ids: Tensor, groups: LengthGroups) -> Tensor | TowerOutput:
        """The same with little padding. Not in evaluations: there no bit depends on the texts beside a text."""
        flat = groups.flat(ids)
        embedded = groups.split(self.token_embedding(flat))
        hidden = torch.cat([(part + self.positional_embedding[: part.shape[1]]).flatten(0, 1) for part in embedded])
        for block in self.transformer.resblocks:
            hidden = block(hidden, groups=groups)
        states = groups.split(self.ln_final(hidden) if self._emits_tokens else hidden)
        pooled = groups.in_order(
            [self._pooled(part, own_ids) for part, own_ids in zip(states, groups.split(flat), strict=True)]
        )
        if not self._emits_tokens:
            return _projected(self.ln_final(pooled), self.text_projection)
        return TowerOutput(_projected(pooled, self.text_projection), groups.padded(states, ids.shape[1]))

    def _pooled(self, states: Tensor, ids: Tensor) -> Tensor:
        pooled: Tensor = text_global_pool(states, ids, self._pool_type, eos_token_id=self._eos_id)
        return pooled


class PaddedTextTower(TextTower):
    """Any other text tower of open_clip, given texts of the full context length as it expects."""

    def __init__(self, tower: nn.Module, context_length: int, pad_id: int) -> None:
        super().__init__(context_length, pad_id)
        self.tower: Any = tower
        self._emits_tokens = False

    @property
    def may_shorten(self) -> bool:
        """Bidirectional and class-token towers compute something else at another length."""
        return False

    def emit_tokens(self) -> None:  # noqa: D102
        if not isinstance(self.tower, TextTransformer) or self.tower.attn_mask is None:
            super().emit_tokens()
        self.tower.output_tokens = self._emits_tokens = True
        use_own_blocks(self.tower.transformer)

    @property
    def remembers(self) -> bool:
        """Whether blocks go on from a cache: not where an engine gathers what the tower owns in its forward alone."""
        is_sharded = hasattr(getattr(self.tower, "positional_embedding", None), "ds_id")
        return self._emits_tokens and not is_sharded and has_own_blocks(self.tower.transformer)

    def projection_parts(self) -> list[nn.Module | nn.Parameter]:  # noqa: D102
        return projection_of(self.tower)

    def forward(
        self,
        tokens: Int64[Tensor, "batch length"],
        lengths: Int64[Tensor, " batch"],
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "batch dim"] | TowerOutput:
        """Embeddings of texts, padded back to the context length first."""
        if cache is not None:
            states = next_states(self.tower, tokens, cache)
            return TowerOutput(states[:, -1], states)
        output = self.tower(self.padded(tokens, lengths, self.context_length))
        if not self._emits_tokens:
            return output  # type: ignore[no-any-return]
        return TowerOutput(output[0], output[1][:, : tokens.shape[1]])


class ClassTokenTextTower(PaddedTextTower):
    """open_clip's causal text transformer with a class token behind each text, at any length (CoCa: Yu et al., 2022).

    The class token sees its text's own tokens and itself, nobody sees it, and its position is the last one at any
    length: padding is invisible.
    """

    def __init__(self, tower: TextTransformer, context_length: int, pad_id: int) -> None:
        super().__init__(_ClassTokenTransformer(tower), context_length, pad_id)
        self._width = tower.token_embedding.embedding_dim

    @property
    def may_shorten(self) -> bool:
        """Always."""
        return True

    def emit_tokens(self) -> None:  # noqa: D102
        self._emits_tokens = True

    def forward(
        self,
        tokens: Int64[Tensor, "batch length"],
        lengths: Int64[Tensor, " batch"],
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "batch dim"] | TowerOutput:
        """Embeddings of texts of any length up to the context length."""
        ids = self.padded(tokens, lengths, tokens.shape[1])
        is_grouped = self.training and self.groups_texts and cache is None
        output = self.tower(ids, lengths, cache, LengthGroups.of(lengths, self._width) if is_grouped else None)
        return TowerOutput(*output) if self._emits_tokens else output[0]


class _ClassTokenTransformer(nn.Module):
    """The parameters of a text transformer with class token, under open_clip's names, and their forward."""

    def __init__(self, tower: TextTransformer) -> None:
        super().__init__()
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.cls_emb = tower.cls_emb
        self.transformer = tower.transformer
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection
        self._heads = tower.heads
        use_own_blocks(self.transformer)

    def forward(
        self, ids: Tensor, lengths: Tensor, cache: list[LayerCache] | None, groups: LengthGroups | None = None
    ) -> tuple[Tensor, Tensor]:
        """The embeddings, and the states of the texts' tokens."""
        if cache is not None:
            states = next_states(self, ids, cache)
            return states[:, -1], states
        if groups is not None and has_own_blocks(self.transformer):
            return self._in_groups(ids, lengths, groups)
        hidden = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        class_token = (self.cls_emb + self.positional_embedding[-1]).expand(len(hidden), 1, -1)
        hidden = torch.cat([hidden, class_token.to(hidden.dtype)], 1)
        hidden = self.transformer(hidden, attn_mask=self._mask(lengths, ids.shape[1], hidden.dtype))
        return _projected(self.ln_final(hidden[:, -1]), self.text_projection), hidden[:, :-1]

    def _in_groups(self, ids: Tensor, lengths: Tensor, groups: LengthGroups) -> tuple[Tensor, Tensor]:
        """The same with little padding, as `CausalTextTower` does."""
        class_token = self.cls_emb + self.positional_embedding[-1]
        embedded = [
            torch.cat([part + self.positional_embedding[: part.shape[1]], class_token.expand(len(part), 1, -1)], 1)
            for part in groups.split(self.token_embedding(groups.flat(ids)))
        ]
        hidden = torch.cat([part.flatten(0, 1) for part in embedded])
        masks = [
            _may_look(own, length)[:, None]
            for own, (_, length) in zip(groups.texts(lengths), groups.shapes, strict=True)
        ]
        longer = groups.longer(1, masks)
        for block in self.transformer.resblocks:
            hidden = block(hidden, groups=longer)
        states = longer.split(hidden)
        pooled = groups.in_order([part[:, -1] for part in states])
        tokens = groups.padded([part[:, :-1] for part in states], ids.shape[1])
        return _projected(self.ln_final(pooled), self.text_projection), tokens

    def _mask(self, lengths: Tensor, length: int, dtype: torch.dtype) -> Float[Tensor, "batch_heads places places"]:
        """0 where a row may look, else -inf."""
        may_look = _may_look(lengths, length)
        mask = torch.zeros(may_look.shape, dtype=dtype, device=lengths.device).masked_fill_(~may_look, -torch.inf)
        return mask.repeat_interleave(self._heads, 0)


def _may_look(lengths: Int64[Tensor, " batch"], length: int) -> Bool[Tensor, "batch places places"]:
    """Where a row may look: tokens back, the class token behind `length` tokens at its text and itself."""
    places = torch.arange(length + 1, device=lengths.device)
    is_text = (places < lengths[:, None]) | (places == length)
    return torch.where(places[:, None] == length, is_text[:, None, :], places <= places[:, None])


def _projected(pooled: Tensor, projection: nn.Linear | nn.Parameter | None) -> Tensor:
    if projection is None:
        return pooled
    projected: Tensor = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
    return projected


def build_image_trunk(embed_dim: int, vision_cfg: Mapping[str, Any], *, quick_gelu: bool) -> nn.Module:
    """open_clip's image tower. Raises UserError when its `vision_cfg` is impossible."""
    try:
        trunk: nn.Module = _build_vision_tower(embed_dim, dict(vision_cfg), quick_gelu)
        if isinstance(trunk, VisionTransformer):
            use_own_blocks(trunk.transformer)
            use_own_patch_dropout(trunk)
        _fit_image_size(trunk, vision_cfg)
    except _BUILD_ERRORS as error:
        raise UserError(f"vision_cfg: open_clip cannot build this image tower: {reason(error)}") from error
    return trunk


def build_text_tower(
    embed_dim: int, text_cfg: Mapping[str, Any], tokenizer: Tokenizer, *, quick_gelu: bool, files: ForeignFiles
) -> TextTower:
    """open_clip's text tower, in the form that needs the least padding. Raises UserError when it is impossible."""
    context_length, pad_id = tokenizer.context_length, tokenizer.pad_id
    try:
        if text_cfg.get("hf_model_name"):
            return PaddedTextTower(_hugging_face_encoder(embed_dim, text_cfg, files), context_length, pad_id)
        fields = {name: value for name, value in text_cfg.items() if name != CORRECT_CLS_MASK}
        tower = _build_text_tower(embed_dim, fields, quick_gelu)
    except _BUILD_ERRORS as error:
        raise UserError(f"text_cfg: open_clip cannot build this text tower: {reason(error)}") from error
    if isinstance(tower, TextTransformer) and _pooled_at_end(tower, pad_id):
        return CausalTextTower(tower, context_length, pad_id)
    if text_cfg.get(CORRECT_CLS_MASK):
        if not isinstance(tower, TextTransformer) or tower.cls_emb is None or tower.attn_mask is None:
            raise UserError(f"text_cfg.{CORRECT_CLS_MASK}: it is for a causal tower with a class token (embed_cls)")
        return ClassTokenTextTower(tower, context_length, pad_id)
    return PaddedTextTower(tower, context_length, pad_id)


def _hugging_face_encoder(embed_dim: int, text_cfg: Mapping[str, Any], files: ForeignFiles) -> nn.Module:
    """open_clip's wrapper of a transformers text model, made from a configuration without code."""
    fields = CLIPTextCfg(**text_cfg)
    name = str(fields.hf_model_name)
    configuration = files.configuration("text", name)
    with folder_of({CONFIG: files.used[f"text.{CONFIG}"]}) as folder:
        encoder: Any = HFTextEncoder(
            str(folder),
            output_dim=embed_dim,
            proj_type=fields.hf_proj_type,
            pooler_type=fields.hf_pooler_type,
            pretrained=False,
            output_tokens=fields.output_tokens,
        )
    if fields.hf_model_pretrained:
        has_decoder = bool(getattr(configuration, "is_encoder_decoder", False))
        options = {} if has_decoder else {"add_pooling_layer": fields.hf_pooler_type == "cls_pooler"}
        model, missing = load(name, configuration, pretrained=True, **options)
        encoder.transformer = model.encoder if has_decoder else model
        require_weights(encoder, missing)
    return encoder  # type: ignore[no-any-return]


def _pooled_at_end(tower: TextTransformer, pad_id: int) -> bool:
    if tower.attn_mask is None or tower.cls_emb is not None:
        return False
    # The largest id marks the end only where padding is not larger still.
    return tower.pool_type == "eos" or (tower.pool_type == "argmax" and pad_id == 0)


def _fit_image_size(trunk: Any, vision_cfg: Mapping[str, Any]) -> None:
    """Bring a timm model to the configured image size, where open_clip leaves it at timm's own."""
    if not vision_cfg.get("timm_model_name") or not hasattr(trunk.trunk, "set_input_size"):
        return
    if tuple(trunk.trunk.default_cfg["input_size"][1:]) != trunk.image_size:
        trunk.set_input_size(trunk.image_size)
