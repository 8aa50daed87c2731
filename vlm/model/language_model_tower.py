"""The first layers of a causal language model of transformers as a text tower, and what is cut off them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import pad

from vlm.errors import UserError
from vlm.model.attention import LayerCache
from vlm.model.causal_models import CausalModel
from vlm.model.text_query import TextQuery
from vlm.model.towers import TextTower, TowerOutput


@dataclass(frozen=True)
class UpperHalf:
    """The last layers of a language model, its norm, and the matrix from a state to the logits of the next token."""

    layers: list[nn.Module]
    rotary: nn.Module | None
    norm: nn.Module
    vocabulary: Float[Tensor, "width vocabulary"]


def cut(model: Any, num_lower: int | None) -> UpperHalf:
    """Take off what lies above the first `num_lower` layers of a causal language model, above half of them for None.

    A vocabulary's matrix that is also the embedding of tokens becomes one of its own: no engine lets two parts of a
    model share one. Raises UserError where no layer would be left on one side.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError("its logits have a bias, for which the decoder has no place")
    causal = CausalModel(model.base_model)
    layers = causal.layers
    num_lower = len(layers) // 2 if num_lower is None else num_lower
    if not 0 < num_lower < len(layers):
        raise UserError(
            f"model.captioner.language_model.unimodal_layers: found {num_lower}; the language model has {len(layers)} "
            "layers, and each half needs one"
        )
    vocabulary = head.weight.detach().T.contiguous()
    upper = UpperHalf(list(layers[num_lower:]), copy.deepcopy(causal.rotary), causal.norm, vocabulary)
    setattr(causal.network, causal.family.layers, nn.ModuleList(layers[:num_lower]))
    setattr(causal.network, causal.family.norm, nn.Identity())
    return upper


class LanguageModelTower(TextTower):
    """A causal language model or its first layers, pooled and projected.

    Padding stands behind a text, where none of its tokens looks: no mask is needed, at any length. `upper` is what was
    cut off, until a decoder takes it.
    """

    def __init__(
        self, model: Any, pool: str, context_length: int, pad_id: int, embed_dim: int, upper: UpperHalf | None = None
    ) -> None:
        super().__init__(context_length, pad_id)
        self.model = model
        self._causal = CausalModel(model)
        self._upper = upper
        self._pool = pool
        self._emits_tokens = False
        self._adapters: list[nn.Module] = []
        width = self._causal.tokens.embedding_dim
        if pool == "query":
            self.query = TextQuery(width, model.config.num_attention_heads)
        else:
            self.pooled_norm = nn.LayerNorm(width)  # the model's own stands behind its last layer
        if pool == "class":
            self.class_token = nn.Parameter(torch.randn(width) * self._causal.tokens.weight.detach().std())
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    @property
    def causal(self) -> CausalModel:
        """The language model by its parts."""
        return self._causal

    def take_upper(self) -> UpperHalf | None:
        """What was cut off, once."""
        upper, self._upper = self._upper, None
        return upper

    @property
    def may_shorten(self) -> bool:
        """Causal, and pooled from a text's own tokens: always."""
        return True

    @property
    def remembers(self) -> bool:  # noqa: D102
        return True

    def emit_tokens(self) -> None:  # noqa: D102
        self._emits_tokens = True

    def projection_parts(self) -> list[nn.Module | nn.Parameter]:
        """What is new: the pool and the projection, and adapters of the layers."""
        names = ("query", "pooled_norm", "class_token", "projection")
        return [*(getattr(self, name) for name in names if hasattr(self, name)), *self._adapters]

    def add_adapters(self, adapters: list[nn.Module]) -> None:
        """Let these parts of its layers train where the layers are locked."""
        self._adapters += adapters

    def drop_adapters(self) -> None:
        """Forget them: they are merged into the layers, which stay locked."""
        self._adapters = []
        self.lock()

    def forward(
        self,
        tokens: Int64[Tensor, "batch length"],
        lengths: Int64[Tensor, " batch"],
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "batch dim"] | TowerOutput:
        """Embeddings of texts of any length up to the context length."""
        length = tokens.shape[1]
        embedded = self._causal.tokens(self.padded(tokens, lengths, length) if cache is None else tokens)
        if self._pool == "class" and cache is None:
            place = torch.arange(length + 1, device=tokens.device) == lengths[:, None]
            embedded = torch.where(place[..., None], self.class_token.to(embedded.dtype), pad(embedded, (0, 0, 0, 1)))
        states = self._causal.norm(self._causal.next_states(embedded, cache))
        if cache is not None:
            return TowerOutput(states[:, -1], states)
        embedding = self.projection(self._pooled(states, lengths))
        return TowerOutput(embedding, states[:, :length]) if self._emits_tokens else embedding

    def _pooled(
        self, states: Float[Tensor, "batch places width"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch width"]:
        if self._pool == "query":
            return self.query(states, lengths)  # type: ignore[no-any-return]
        rows = torch.arange(len(states), device=states.device)
        if self._pool == "mean":
            own = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
            pooled = (states * own[..., None]).sum(1) / lengths[:, None]
        else:
            pooled = states[rows, {"first": lengths * 0, "end": lengths - 1, "class": lengths}[self._pool]]
        return self.pooled_norm(pooled)  # type: ignore[no-any-return]
