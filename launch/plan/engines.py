"""How each engine shares weights, gradients and moments: what a rank holds of them, and what it sends in a step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from vlm.errors import UserError, nearest
from vlm.model.captioner import Decoder
from vlm.model.dual_encoder import DualEncoder
from vlm.model.towers import Tower
from vlm.training.engines.options import EngineOptions

_BYTES = 4
_MIB = 2**20
_DDP_BUCKET, _ZERO_BUCKET = 25 * _MIB, 200 * _MIB
# DeepSpeed's own: elements of a weight that stays gathered, of all that may be gathered, and of what is sent at once.
_PERSISTENT, _MOST_GATHERED, _PREFETCHED = 10**5, 10**9, 5 * 10**7


@dataclass(frozen=True)
class Unit:
    """A part of the model that fsdp gathers: bytes of its weights outside blocks, and those of each of its blocks."""

    own: int
    blocks: tuple[int, ...]

    @property
    def most(self) -> int:
        """Bytes of its largest block."""
        return max(self.blocks, default=0)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's fp32 weights: all, those that train, small tensors, the largest one, and its parts."""

    weights: int
    trained: int
    small: int
    largest: int
    units: tuple[Unit, ...]

    @property
    def num_gathers(self) -> int:
        """Collectives that gather the whole model once, unit by unit."""
        return sum(len(unit.blocks) + 1 for unit in self.units) + 1


@dataclass(frozen=True)
class Cluster:
    """So many nodes with so many ranks each."""

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Shares:
    """What a rank holds under an engine, in bytes, and what it sends.

    As the backward goes on, `growing` is the share of each finished gradient that stays beside `gradients`, which are
    held from before; each takes `passing` times its size when it is finished, and once more beyond a `bucket`. Where
    several micro-batches are added up, gradients take `added` from the second one on. `message` is the largest piece of
    weights that travels while the model computes: gloo, on a CPU, has it once more. `in_step` comes while weights are
    updated, of which a rank updates `updated`; `gathered` while the model computes. `host` lies in the node's memory
    instead. `copies` are the bytes of an average of the weights.

    Sent in a step: `reduced` bytes of gradients in `reductions` collectives; `gathers` bytes of weights for each pass
    of a micro-batch through the model, in `gather_calls`; `spread` bytes of updated weights.
    """

    weights: float
    gradients: float
    growing: float
    added: float
    moments: float
    passing: float = 0.0
    bucket: float = 0.0
    buffers: float = 0.0
    gathered: float = 0.0
    message: float = 0.0
    in_step: float = 0.0
    updated: float = 0.0
    copies: float = 0.0
    host: float = 0.0
    reduced: float = 0.0
    reductions: int = 0
    gathers: float = 0.0
    gather_calls: int = 0
    spread: float = 0.0


def sizes_of(model: DualEncoder) -> Sizes:
    """The sizes of a model, whose parts are those that fsdp shards."""
    parameters = list(model.parameters())
    children = [child for child in model.children() if not isinstance(child, nn.ParameterDict)]
    parts = [child for child in children if next(child.parameters(), None) is not None]
    units = []
    for part in parts:
        blocks = tuple(_bytes(block) for block in part.blocks()) if isinstance(part, Tower | Decoder) else ()
        units.append(Unit(_bytes(part) - sum(blocks), blocks))
    return Sizes(
        weights=sum(parameter.numel() for parameter in parameters) * _BYTES,
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _BYTES,
        small=sum(parameter.numel() for parameter in parameters if parameter.numel() <= _PERSISTENT) * _BYTES,
        largest=max(parameter.numel() for parameter in parameters) * _BYTES,
        units=tuple(units),
    )


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * _BYTES


Rule = Callable[[Sizes, Cluster, EngineOptions, float], Shares]


def _ddp(sizes: Sizes, cluster: Cluster, options: EngineOptions, moments: float) -> Shares:
    """Whole weights everywhere; gradients lie in the buckets that travel, which are there from the start."""
    trained, ranks = sizes.trained, cluster.ranks
    alone = ranks == 1
    return Shares(
        weights=sizes.weights,
        gradients=0.0 if alone else trained,
        growing=1.0 if alone else 0.0,
        added=trained,
        moments=moments * trained,
        buffers=0.0 if alone or options.wire == "fp32" else _bucket(options, _DDP_BUCKET) / 2,
        updated=trained,
        copies=trained,
        reduced=0.0 if alone else 2 * (ranks - 1) / ranks * trained * _wire(options),
        reductions=0 if alone else -(-trained // _bucket(options, _DDP_BUCKET)),
    )


def _zero1(sizes: Sizes, cluster: Cluster, options: EngineOptions, moments: float) -> Shares:
    """As under stage 2, but gradients of several micro-batches stay whole beside those of the part."""
    shares = _zero2(sizes, cluster, options, moments)
    return replace(shares, added=shares.added + sizes.trained)


def _zero2(sizes: Sizes, cluster: Cluster, options: EngineOptions, moments: float) -> Shares:
    """Whole flat weights, and of its part a rank's master copy, moments, and gradients once they are reduced.

    Those of several micro-batches have room for every tensor in the part, also for the one that reaches into the next.
    """
    ranks, bucket = cluster.ranks, _bucket(options, _ZERO_BUCKET)
    part = sizes.trained / ranks
    on_host = options.offload.optimizer == "cpu"
    return Shares(
        weights=sizes.weights,
        gradients=0.0,
        growing=1 / ranks,
        added=min(sizes.trained, part + sizes.largest),
        passing=1.0,
        bucket=bucket,
        moments=0.0 if on_host else moments * part,
        buffers=(0.0 if on_host else part) + bucket * (1 if options.overlap is False else 2),
        in_step=part,
        updated=part,
        copies=sizes.trained,
        host=(moments + 2) * part if on_host else 0.0,
        reduced=(ranks - 1) / ranks * sizes.trained * _wire(options),
        reductions=-(-sizes.trained // bucket) if ranks > 1 else 0,
        spread=(ranks - 1) / ranks * sizes.trained,
    )


def _zero3(sizes: Sizes, cluster: Cluster, options: EngineOptions, moments: float) -> Shares:
    """A part of everything; weights that are gathered stay until the backward is over, up to a limit.

    Master weights are a copy. What is gathered is there as it came, tensor by tensor in pieces, and put together.
    """
    ranks, bucket = cluster.ranks, _bucket(options, _ZERO_BUCKET)
    part, held = sizes.trained / ranks, sizes.weights / ranks
    optimizer_on_host, weights_on_host = options.offload.optimizer is not None, options.offload.parameters is not None
    away = (part * (moments + 2) if optimizer_on_host else 0.0) + (held if weights_on_host else 0.0)
    travels = (ranks - 1) / ranks * sizes.weights
    return Shares(
        weights=sizes.small + (0.0 if weights_on_host else held),
        gradients=0.0 if optimizer_on_host else part,
        growing=0.0,
        added=0.0 if optimizer_on_host else part,
        passing=1.0,
        bucket=bucket,
        moments=0.0 if optimizer_on_host else moments * part,
        buffers=bucket + (0.0 if optimizer_on_host else part),
        gathered=2 * min(sizes.weights - sizes.small, _MOST_GATHERED * _BYTES),
        message=min(sizes.weights - sizes.small, _PREFETCHED * _BYTES),
        updated=part,
        copies=part,
        host=away,
        reduced=(ranks - 1) / ranks * sizes.trained * _wire(options),
        reductions=-(-sizes.trained // bucket) if ranks > 1 else 0,
        gathers=travels,
        gather_calls=sizes.num_gathers if ranks > 1 else 0,
    )


def _fsdp(sizes: Sizes, cluster: Cluster, options: EngineOptions, moments: float) -> Shares:
    """A part of everything; of the weights the current block is gathered, the next one ahead, and what is in no block.

    A block's gradient is there whole, and once more as what is sent, until it is reduced. Gradients of micro-batches
    are added up whole, and reduced after the last.
    """
    group = {"all": cluster.ranks, "node": cluster.per_node}.get(str(options.shard_group))
    shards = int(options.shard_group) if group is None else group
    part, ahead = sizes.trained / shards, 1 + (options.prefetch or 1)
    gathered = max((unit.own + (ahead + 2) * unit.most for unit in sizes.units), default=0)
    on_host = options.offload.parameters == "cpu"
    copies = cluster.ranks / shards
    reduced = (shards - 1) / shards * sizes.trained + 2 * (copies - 1) / copies * part
    return Shares(
        weights=0.0 if on_host else sizes.weights / shards,
        gradients=0.0,
        growing=0.0 if on_host else 1 / shards,
        added=sizes.trained,
        passing=1.0 if shards > 1 else 0.0,
        bucket=math.inf,
        moments=0.0 if on_host else moments * part,
        gathered=gathered if shards > 1 or on_host else 0,
        message=max((max(unit.own, unit.most) for unit in sizes.units), default=0) if shards > 1 else 0,
        updated=part,
        copies=part,
        host=(moments + 1) * part + sizes.weights / shards if on_host else 0.0,
        reduced=reduced * _wire(options),
        reductions=sizes.num_gathers if cluster.ranks > 1 else 0,
        gathers=(shards - 1) / shards * sizes.weights,
        gather_calls=sizes.num_gathers if shards > 1 else 0,
    )


_RULES: dict[str, Rule] = {"ddp": _ddp, "zero1": _zero1, "zero2": _zero2, "zero3": _zero3, "fsdp": _fsdp}
ENGINES = tuple(_RULES)


def shares_of(engine: str, sizes: Sizes, cluster: Cluster, options: EngineOptions, moments: float) -> Shares:
    """What a rank holds and sends under this engine; the optimizer keeps so many `moments` of each weight on average.

    Raises UserError for an engine that is not one of ours.
    """
    if engine not in _RULES:
        raise UserError(f"engine: {engine!r} is not one that can be planned; {nearest(engine, _RULES)}")
    shares = _RULES[engine](sizes, cluster, options, moments)
    return shares if cluster.ranks > 1 else replace(shares, gathered=0.0, message=0.0)


def _bucket(options: EngineOptions, default: int) -> int:
    return default if options.bucket_mib is None else options.bucket_mib * _MIB


def _wire(options: EngineOptions) -> float:
    return 0.5 if options.wire == "bf16" else 1.0
