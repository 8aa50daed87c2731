"""transformers' vision and text models as towers: pooled, and projected to the embedding."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlm.errors import UserError
from vlm.model.attention import LayerCache
from vlm.model.causal_models import CausalModel, sees_all
from vlm.model.text_packing import PackedTexts
from vlm.model.text_query import TextQuery
from vlm.model.towers import TextTower, TowerOutput

# Text models whose attention mask and positions make padding exactly invisible. Others get the full context length.
_EXACTLY_MASKED = frozenset({"bert", "clip_text_model", "distilbert", "gpt2", "roberta", "xlm-roberta"})
# Those of them that take several texts in a row, by positions and a mask of queries and keys; True: causal ones.
_PACKED = {"bert": False, "clip_text_model": True, "gpt2": True, "roberta": False, "xlm-roberta": False}
# Text models whose positions begin behind the padding's id.
_POSITIONS_BEHIND_PADDING = frozenset({"roberta", "xlm-roberta"})
# Text models that were trained without a mask, on texts padded to the full context length.
_NEVER_MASKED = frozenset({"siglip_text_model"})


class TransformersImageTrunk(nn.Module):
    """A vision model, pooled and projected: by `projection`, or where that is None by a new one to `embed_dim`."""

    def __init__(
        self, model: nn.Module, pool: str, image_size: int, embed_dim: int, projection: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._pool = pool
        pooled = _trainable_where_used(model, lambda: self._pooled(torch.zeros(1, 3, image_size, image_size)))
        self.projection = _projection(pooled, embed_dim) if projection is None else projection
        self.output_tokens = False

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"] | tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch tokens width"]]:
        """Embeddings of normalised pixels, and with `output_tokens` the last hidden states."""
        output = self.model(pixel_values=pixels)
        embedding = self.projection(self._pooled_of(output))
        return (embedding, _hidden_states(output)) if self.output_tokens else embedding

    def _pooled(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch width"]:
        return self._pooled_of(self.model(pixel_values=pixels))

    def _pooled_of(self, output: Any) -> Float[Tensor, "batch width"]:
        if self._pool == "pooler":
            return _pooler_output(output).flatten(1)
        hidden = _hidden_states(output)
        return hidden[:, 0] if self._pool == "first" else hidden.mean(1)


class TransformersTextTower(TextTower):
    """A text model, pooled and projected; its attention mask, if it knows one, is made of the texts' lengths."""

    def __init__(
        self,
        model: Any,
        pool: str,
        context_length: int,
        pad_id: int,
        embed_dim: int,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__(context_length, pad_id)
        self.model = model
        self._pool = pool
        tokens = torch.zeros(1, context_length, dtype=torch.long)
        lengths = torch.full((1,), context_length)
        self._emits_tokens = False
        if pool == "query":
            self.query = TextQuery(model.config.hidden_size, model.config.num_attention_heads)
        pooled = _trainable_where_used(model, lambda: self._pooled(tokens, lengths)[0])
        self.projection = _projection(pooled, embed_dim) if projection is None else projection
        self._causal = _causal_model(model, context_length)

    def projection_parts(self) -> list[nn.Module | nn.Parameter]:  # noqa: D102
        return [self.query, self.projection] if self._pool == "query" else super().projection_parts()

    def emit_tokens(self) -> None:
        """Let every forward tell the last hidden states too; whoever asks finds out whether they look ahead."""
        self._emits_tokens = True

    @property
    def remembers(self) -> bool:
        """Whether it is a causal language model whose layers are known."""
        return self._causal is not None

    @property
    def may_shorten(self) -> bool:
        """Whether this kind of model is known to ignore padding exactly."""
        return self.model.config.model_type in _EXACTLY_MASKED

    def forward(
        self,
        tokens: Int64[Tensor, "batch length"],
        lengths: Int64[Tensor, " batch"],
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "batch dim"] | TowerOutput:
        """Embeddings of texts, padded back to the context length where the model needs it."""
        if cache is not None:
            assert self._causal is not None
            following = self._causal.norm(self._causal.next_states(self._causal.tokens(tokens), cache))
            return TowerOutput(following[:, -1], following)
        length = tokens.shape[1] if self.may_shorten else self.context_length
        pooled, states = self._pooled(self.padded(tokens, lengths, length), lengths)
        embedding = self.projection(pooled)
        return TowerOutput(embedding, states[:, : tokens.shape[1]]) if self._emits_tokens else embedding

    def _pooled(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch length width"]]:
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        if self.training and self.groups_texts and self.packs_texts:
            hidden = self._packed(tokens, lengths)
        else:
            attention_mask = None if self.model.config.model_type in _NEVER_MASKED else mask.long()
            output = self.model(input_ids=tokens, attention_mask=attention_mask)
            hidden = output.last_hidden_state
            if self._pool == "pooler":
                return _pooler_output(output), hidden
        if self._pool == "query":
            return self.query(hidden, lengths), hidden
        if self._pool == "first":
            return hidden[:, 0], hidden
        if self._pool == "end":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1], hidden
        return (hidden * mask[..., None]).sum(1) / lengths[:, None], hidden

    @property
    def packs_texts(self) -> bool:
        """Whether several texts can stand in a row of this kind of model: pooled from states that are each text's."""
        config = self.model.config
        takes_masks = getattr(config, "_attn_implementation", None) == "sdpa"
        return takes_masks and config.model_type in _PACKED and self._pool != "pooler"

    def _packed(self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]) -> Tensor:
        """The states of all tokens, zeros behind each text; as if each had been alone."""
        packed, kind = PackedTexts.of(lengths), self.model.config.model_type
        before = self.model.config.pad_token_id + 1 if kind in _POSITIONS_BEHIND_PADDING else 0
        rows: Tensor = self.model(
            input_ids=packed.ids(tokens, self.pad_id),
            attention_mask=packed.mask(is_causal=_PACKED[kind]),
            position_ids=packed.position + before,
        ).last_hidden_state
        states = packed.texts(rows)
        return torch.nn.functional.pad(states, (0, 0, 0, tokens.shape[1] - states.shape[1]))


def _causal_model(model: Any, context_length: int) -> CausalModel | None:
    """The parts of a model that can go on behind tokens that it knows; None where nobody knows how."""
    try:
        causal = CausalModel(model)
    except UserError:
        return None
    return causal if sees_all(model.config, context_length) else None


def _hidden_states(output: Any) -> Float[Tensor, "batch tokens width"]:
    hidden: Tensor = output.last_hidden_state
    # Convolutional: [batch, width, rows, columns].
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def _pooler_output(output: Any) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise UserError("pool: the model has no pooler; choose another pool")
    return pooled  # type: ignore[no-any-return]


@torch.enable_grad()
def _trainable_where_used(model: nn.Module, pooled: Callable[[], Tensor]) -> Tensor:
    """One pooled output of `model`, whose parameters without influence on it are frozen.

    An engine that averages gradients would wait for theirs in vain.
    """
    was_training = model.training
    model.eval()
    output = pooled()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(output.sum(), parameters, allow_unused=True), strict=True
    ):
        parameter.requires_grad_(gradient is not None)
    model.train(was_training)
    return output.detach()


def _projection(pooled: Float[Tensor, "1 width"], embed_dim: int) -> nn.Linear:
    projection = nn.Linear(pooled.shape[1], embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=pooled.shape[1] ** -0.5)
    return projection
