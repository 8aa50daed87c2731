"""Pre-norm attention blocks with open_clip's parameters, which remember keys and values from one token to the next."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float
from open_clip.transformer import LayerScale, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from vlm.attention_choice import AttentionChoice, AttentionWay, MeasuredAttention
from vlm.errors import EveryRankError
from vlm.model.length_groups import LengthGroups

Norm = Callable[[int], nn.Module]
_LEAST_ROOM = 32  # tokens


class LayerCache:
    """Keys and values of one layer [batch, heads, length, head_dim]: all so far, or all there will ever be.

    They stand in buffers with room for more, so that a token copies its own alone.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.length = 0

    @property
    def keys(self) -> Float[Tensor, "batch heads length head_dim"] | None:
        """Of the tokens so far; None before the first."""
        return None if self._keys is None else self._keys[:, :, : self.length]

    @property
    def values(self) -> Float[Tensor, "batch heads length head_dim"] | None:
        """Of the same tokens."""
        return None if self._values is None else self._values[:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, these among them. For generation: no gradient goes back through them."""
        start, self.length = self.length, self.length + keys.shape[2]
        self._keys = _with_room(self._keys, keys, start, self.length)
        self._values = _with_room(self._values, values, start, self.length)
        self._keys[:, :, start : self.length] = keys
        self._values[:, :, start : self.length] = values
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def keep(self, keys: Tensor, values: Tensor) -> None:
        """Take these for all there will ever be: head by head, as every later token reads them."""
        self._keys, self._values, self.length = keys.contiguous(), values.contiguous(), keys.shape[2]

    def take(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, in this order; a row may come several times."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]


def _with_room(known: Tensor | None, new: Tensor, start: int, length: int) -> Tensor:
    """A buffer that holds what is known, and has room for `length` tokens."""
    if known is not None and known.shape[2] >= length:
        return known
    batch, heads, _, head_dim = new.shape
    buffer = new.new_empty(batch, heads, max(length, 2 * start, _LEAST_ROOM), head_dim)
    if known is not None:
        buffer[:, :, :start] = known[:, :, :start]
    return buffer


class Attention(nn.Module):
    """Multi-head attention of rows to each other, or to a memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads = heads
        self.choice: AttentionChoice = "auto"
        self.measured: MeasuredAttention | None = None
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "*batch queries width"],
        memory: Float[Tensor, "batch_memory keys width"] | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: LayerCache | None = None,
        is_cross: bool = False,
        groups: LengthGroups | None = None,
    ) -> Float[Tensor, "*batch queries width"]:
        """Values weighted by attention. Several sequences in a row may share one memory: as many each.

        Across to a memory whose keys are in the cache, the memory itself is no longer needed. There a mask is Bool
        [batch, queries, keys], and a query that may look nowhere gets 0. Of texts in groups `x` has all tokens, which
        see those of their own text as `LengthGroups` says.
        """
        if groups is not None:
            return self._in_groups(x, groups)
        width = x.shape[2]
        if not is_cross:
            queries, keys, values = (self._split(part) for part in self._project(x, 0, 3).split(width, 2))
            if cache is not None:
                keys, values = cache.append(keys, values)
            return self._attend(queries, keys, values, mask, causal=causal)
        if cache is not None and cache.keys is not None and cache.values is not None:
            keys, values = cache.keys, cache.values
        else:
            assert memory is not None
            keys, values = (self._split(part) for part in self._project(memory, 1, 3).split(width, 2))
            if cache is not None:
                cache.keep(keys, values)
        # Nothing is causal here: the sequences of one memory are more queries of it, and no key is copied for them.
        num_queries = x.shape[0] * x.shape[1] // max(1, len(keys))
        queries = self._split(self._project(x.reshape(len(keys), num_queries, width), 0, 1))
        if mask is None:
            return self._attend(queries, keys, values, None).reshape(x.shape)
        looks = mask.any(2, keepdim=True)
        shown = (mask | ~looks).reshape(len(keys), 1, num_queries, mask.shape[2])  # no softmax of nothing
        return self._attend(queries, keys, values, shown).reshape(x.shape) * looks

    def _in_groups(self, x: Tensor, groups: LengthGroups) -> Tensor:
        attended = []
        projected = self._project(x, 0, 3).unflatten(1, (3, self.heads, -1))
        for number, group in enumerate(groups.split(projected)):
            queries, keys, values = group.permute(2, 0, 3, 1, 4)
            mask = None if groups.masks is None else groups.masks[number]
            attended.append(self._weighted(queries, keys, values, mask, is_causal=mask is None).flatten(0, 1))
        joined: Tensor = self.out_proj(torch.cat(attended))
        return joined

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool = False
    ) -> Tensor:
        earlier = keys.shape[2] - queries.shape[2]
        is_causal = causal and not earlier and queries.shape[2] > 1
        if causal and earlier and queries.shape[2] > 1:
            mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=keys.device).tril(earlier)
        joined: Tensor = self.out_proj(self._weighted(queries, keys, values, mask, is_causal=is_causal))
        return joined

    def _weighted(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, is_causal: bool
    ) -> Float[Tensor, "batch queries width"]:
        attend = WAYS[self._way(queries.shape[2], keys.shape[2])]
        return attend(queries, keys, values, mask, is_causal=is_causal).transpose(1, 2).flatten(2)

    def _way(self, queries: int, keys: int) -> AttentionWay:
        """How so many queries and keys are computed: in training as was measured for gradients, if anything was."""
        if self.choice != "auto":
            return self.choice
        # By mode and not by gradient: micro-batches are embedded without one first, and are to be the same then.
        return self.measured.way(queries, keys) if self.training and self.measured else "fused"

    def _project(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The projections `start` to `stop` of x: queries, keys, values."""
        width = x.shape[-1]
        rows = slice(start * width, stop * width)
        return linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return heads


def choose_attention(model: nn.Module, choice: AttentionChoice) -> None:
    """Let all our blocks of a model compute attention by torch's fused operator or explicitly, or as is faster.

    Raises EveryRankError when a choice would change nothing, since the model has none of our blocks.
    """
    ours = [module for module in model.modules() if isinstance(module, Attention)]
    if not ours and choice != "auto":
        raise EveryRankError(
            f"attention: {choice}: no block of this model takes it, only open_clip's and ours; leave it out"
        )
    for module in ours:
        module.choice = choice


def _attend_fused(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    return scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal)


def _attend_in_steps(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """What `scaled_dot_product_attention` computes, one step after the other."""
    scores = (queries * queries.shape[3] ** -0.5) @ keys.transpose(2, 3)
    if is_causal:
        mask = torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    attended: Tensor = scores.softmax(3).to(values.dtype) @ values
    return attended


def _attend_by_kernel(
    backend: SDPBackend, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, is_causal: bool
) -> Tensor:
    """The fused operator by one of its kernels, where there is no mask and the device has it."""
    if mask is not None:
        return _attend_fused(queries, keys, values, mask, is_causal=is_causal)
    with sdpa_kernel([backend, *_KERNELS], set_priority=True):
        return _attend_fused(queries, keys, values, None, is_causal=is_causal)


class _Attend(Protocol):
    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, is_causal: bool
    ) -> Tensor: ...


_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
WAYS: Mapping[AttentionWay, _Attend] = {
    "fused": _attend_fused,
    "explicit": _attend_in_steps,
    "flash": partial(_attend_by_kernel, SDPBackend.FLASH_ATTENTION),
    "memory_efficient": partial(_attend_by_kernel, SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": partial(_attend_by_kernel, SDPBackend.CUDNN_ATTENTION),
}
"""The functions from queries, keys and values [batch, heads, length, head_dim] to the values weighted by attention."""


class Mlp(nn.Module):
    """Two linear maps around an activation."""

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = activation
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length width"]:  # noqa: D102
        return self.c_proj(self.gelu(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and an MLP, each after a norm and added to its input; a cross block attends to a memory."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        *,
        is_cross: bool = False,
        activation: Callable[[], nn.Module] = nn.GELU,
        layer_scale: float | None = None,
        gate: Callable[[], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.is_cross = is_cross
        self.ln_1: nn.Module = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ls_1: nn.Module = gate() if layer_scale is None else LayerScale(width, layer_scale)
        if is_cross:
            self.ln_1_kv: nn.Module = nn.LayerNorm(width)
        self.ln_2: nn.Module = nn.LayerNorm(width)
        self.mlp: nn.Module = Mlp(width, int(width * mlp_ratio), activation())
        self.ls_2: nn.Module = gate() if layer_scale is None else LayerScale(width, layer_scale)

    @staticmethod
    def of_open_clip(block: Any, kind: "type[Block] | None" = None) -> "Block":
        """The same block as one of ours, with its parameters by the same names. Raises ValueError for another kind."""
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            raise ValueError(f"blocks of open_clip's class {type(block).__name__} remember no keys")
        with torch.device("meta"):
            new = (kind or Block)(block.attn.embed_dim, block.attn.num_heads, 1)
        new.attn.in_proj_weight, new.attn.in_proj_bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        new.attn.out_proj.weight, new.attn.out_proj.bias = block.attn.out_proj.weight, block.attn.out_proj.bias
        new.ln_1, new.ls_1, new.ln_2, new.mlp, new.ls_2 = block.ln_1, block.ls_1, block.ln_2, block.mlp, block.ls_2
        return new

    def forward(
        self,
        x: Float[Tensor, "*batch length width"],
        memory: Float[Tensor, "batch_memory keys width"] | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: LayerCache | None = None,
        groups: LengthGroups | None = None,
    ) -> Float[Tensor, "*batch length width"]:
        """The block's output; `mask` [..., queries, keys] is true where a query may look, or added to the logits.

        To a memory it is Bool, and of a query that may look nowhere the MLP alone changes something. Of texts in groups
        see `Attention`.
        """
        if self.is_cross and memory is not None and (cache is None or cache.keys is None):
            memory = self.ln_1_kv(memory)
        attended = self.attn(
            self.ln_1(x), memory, mask=mask, causal=causal, cache=cache, is_cross=self.is_cross, groups=groups
        )
        x = x + self.ls_1(attended)
        return x + self.ls_2(self.mlp(self.ln_2(x)))  # type: ignore[no-any-return]


def initialise_blocks(blocks: Iterable[nn.Module], width: int, layers: int) -> None:
    """Normal weights, narrower where they are added to the stream of 2 x 2 x layers blocks (as GPT-2)."""
    for block in blocks:
        assert isinstance(block, Block)
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (4 * layers) ** -0.5)
        nn.init.zeros_(block.attn.out_proj.bias)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (4 * layers) ** -0.5)  # type: ignore[union-attr, arg-type]
