"""The causal language models of transformers by their parts, run layer by layer: cut in two, or token after token."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vlm.errors import UserError
from vlm.model.attention import LayerCache


@dataclass(frozen=True)
class Family:
    """The names under which a family of models has its parts; `adapted` are the maps that LoRA's paper adapts."""

    tokens: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    positions: str | None = None  # a table that is added to the tokens; None: the layers turn by `rotary_emb`
    dropout: str | None = None
    adapted: tuple[str, ...] = ("q_proj", "v_proj")


_LLAMA = Family()
_GPT2 = Family("wte", "h", "ln_f", positions="wpe", dropout="drop", adapted=("c_attn",))
FAMILIES = {
    "gpt2": _GPT2,
    "gpt_neo": Family("wte", "h", "ln_f", positions="wpe", dropout="drop"),
    "gpt_neox": Family("embed_in", "layers", "final_layer_norm", dropout="emb_dropout", adapted=("query_key_value",)),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "opt": Family("embed_tokens", "layers", "final_layer_norm", positions="embed_positions"),
    "phi3": Family(adapted=("qkv_proj",)),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""By transformers' `model_type`. Their layers see no later token, and take no more than states and places."""

# What a layer calls the keys and values of earlier tokens, by release and family.
_CACHES = ("cache", "past_key_values", "layer_past")


class Places(NamedTuple):
    """The places of some tokens in their texts, as layers ask for them."""

    numbers: Int64[Tensor, "1 length"]
    rotation: tuple[Tensor, Tensor] | None  # cosine and sine, of models that turn queries and keys
    mask: Bool[Tensor, "1 1 length keys"] | None  # None: the layers themselves look back alone


class CausalModel:
    """A causal model of the library, by its parts. It owns none of them: the `network` that it reads does.

    Raises UserError for a family that is not among `FAMILIES`, or of which this one differs.
    """

    def __init__(self, network: Any) -> None:
        self.family = family_of(network.config)
        self.network = getattr(network, "decoder", network)  # of OPT, whose other half does not exist
        if getattr(self.network, "project_in", None) is not None:
            raise UserError("its token embeddings have another width than its layers")

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Its layers, in order."""
        return list(getattr(self.network, self.family.layers))

    @property
    def tokens(self) -> nn.Embedding:
        """Its embedding of tokens."""
        return getattr(self.network, self.family.tokens)  # type: ignore[no-any-return]

    @property
    def norm(self) -> nn.Module:
        """Its norm behind the last layer."""
        return getattr(self.network, self.family.norm) or nn.Identity()

    @property
    def rotary(self) -> nn.Module | None:
        """What tells how far queries and keys are turned; None where places are added to tokens."""
        return getattr(self.network, "rotary_emb", None)

    def first_states(
        self, embedded: Float[Tensor, "batch length width"], start: int
    ) -> Float[Tensor, "batch length width"]:
        """The states before the first layer, of embedded tokens of which the first stands at `start`."""
        if self.family.positions is not None:
            table = getattr(self.network, self.family.positions)
            numbers = _numbers(embedded, start)
            embedded = embedded + (table(None, position_ids=numbers) if hasattr(table, "offset") else table(numbers))
        dropout = self.family.dropout
        return embedded if dropout is None else getattr(self.network, dropout)(embedded)

    def next_states(
        self, embedded: Float[Tensor, "batch length width"], cache: list[LayerCache] | None = None
    ) -> Float[Tensor, "batch length width"]:
        """The states behind the last layer; a cache that knows earlier tokens goes on behind them."""
        start = begin(cache, len(self.layers))
        states = self.first_states(embedded, start)
        places = places_of(states, start, self.rotary)
        for number, layer in enumerate(self.layers):
            states = run_layer(layer, states, places, None if cache is None else cache[number])
        return states


def family_of(configuration: PreTrainedConfig) -> Family:
    """The family of a model. Raises UserError, which names those that are known, for any other."""
    family = FAMILIES.get(configuration.model_type)
    if family is None or getattr(configuration, "is_encoder_decoder", False):
        raise UserError(
            f"model_type {configuration.model_type} is no causal language model whose layers are known here (choose "
            f"from: {', '.join(FAMILIES)})"
        )
    return family


def sees_all(configuration: PreTrainedConfig, length: int) -> bool:
    """Whether the last token of a text of this length sees the first: some models look back at so many at most."""
    window = getattr(configuration, "sliding_window", None)
    return window is None or length <= window


def begin(cache: list[LayerCache] | None, num_layers: int) -> int:
    """How many tokens a cache knows; an empty one gets its layers."""
    if cache is None:
        return 0
    if not cache:
        cache.extend(LayerCache() for _ in range(num_layers))
    return cache[0].length


def places_of(states: Float[Tensor, "batch length width"], start: int, rotary: nn.Module | None) -> Places:
    """The places of tokens of which the first stands at `start`."""
    numbers, length = _numbers(states, start), states.shape[1]
    mask = None
    if start and length > 1:  # the library takes one token, or a beginning, without a mask
        mask = torch.ones(1, 1, length, start + length, dtype=torch.bool, device=states.device).tril(start)
    return Places(numbers, None if rotary is None else rotary(states, position_ids=numbers), mask)


def run_layer(
    layer: nn.Module, states: Float[Tensor, "batch length width"], places: Places, cache: LayerCache | None
) -> Float[Tensor, "batch length width"]:
    """The states behind one layer of any of the families."""
    options: dict[str, Any] = {"attention_mask": places.mask, "position_ids": places.numbers}
    if places.rotation is not None:
        options["position_embeddings"] = places.rotation
    if cache is not None:
        options[_cache_name(layer)] = _Remembered(cache)
    made = layer(states, **options)
    return made[0] if isinstance(made, tuple) else made  # type: ignore[no-any-return]


class _Remembered:
    """One layer's cache, as the library's attention asks it."""

    def __init__(self, layer: LayerCache) -> None:
        self._layer = layer

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, these among them."""
        return self._layer.append(keys, values)


def _cache_name(layer: nn.Module) -> str:
    known: Iterable[str] = inspect.signature(layer.forward).parameters
    return next(name for name in _CACHES if name in known)


def _numbers(states: Tensor, start: int) -> Int64[Tensor, "1 length"]:
    return torch.arange(start, start + states.shape[1], device=states.device)[None]
