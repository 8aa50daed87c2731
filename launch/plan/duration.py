"""Time of a step: computing, what travels between ranks, and the data, each by the figures of a GPU."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from launch.plan.engines import Cluster, Shares
from launch.plan.gpu import GIGA, MICRO, Gpu
from launch.plan.memory import Load
from launch.plan.work import Costs, Work
from launch.recipe import Recipe
from vlm.objectives.objective import Objective
from vlm.similarity.config import SimilarityConfig
from vlm.training.precision import Precision

_BYTES = 4
_UPDATE_PASSES = 11  # over a weight: its gradient's norm and clipping, then four read and three written by AdamW
_AVERAGE_PASSES = 3
_TILE_PASSES = 8  # over the entries of a tile, in both directions
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 6


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go into; `hidden` are those that pass beside others.

    `reads` are seconds that the data takes for a step, by cores that compute nothing else; the step waits for the rest.
    """

    parts: Mapping[str, float]
    hidden: Mapping[str, float]
    reads: float
    model_flops: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())

    @property
    def bottleneck(self) -> str:
        """What most of the step goes into."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class Machine:
    """GPUs of a kind in a cluster."""

    gpu: Gpu
    cluster: Cluster


def step_time(
    machine: Machine, recipe: Recipe, objective: Objective, work: Work, shares: Shares, load: Load, averages: int
) -> StepTime:
    """The time of a step of one rank; all ranks have as much to do."""
    precision, workers = recipe.decided_precision, recipe.data.workers
    gpu, rows = machine.gpu, min(load.rows, load.micro_batch)
    forward, backward = work.costs("forward", rows), work.costs("backward", rows)
    times, share = load.micro_batches, load.rows / (load.micro_batches * rows)  # the last one may be smaller
    first, second = _seconds(gpu, forward, precision), _seconds(gpu, backward, precision)
    parts = {
        "products": times * share * (first.products + second.products),
        "plain operations": times * share * (first.plain + second.plain),
    }
    if times > 1:
        parts["embedding before"] = times * share * (first.products + first.plain)
    parts["comparison of pairs"] = _comparison(machine, objective, recipe.comparison, load)
    passes_over = _UPDATE_PASSES * shares.updated + averages * _AVERAGE_PASSES * shares.copies
    parts["update"] = passes_over / gpu.memory_rate
    computing = parts["products"] + parts["plain operations"]
    passes = 2 * times + (times if times > 1 else 0)
    travels = {
        "gradients between ranks": _travel(machine, shares.reduced, shares.reductions),
        "weights between ranks": _travel(machine, passes * shares.gathers, passes * shares.gather_calls),
    }
    hidden, room = {}, gpu.overlap * computing
    for name, seconds in travels.items():
        hidden[name] = min(seconds, room)
        room -= hidden[name]
        parts[name] = seconds - hidden[name]
    parts["weights between ranks"] += _travel(machine, shares.spread, 1)
    parts["embeddings between ranks"] = _exchange(machine, objective, recipe.comparison, load)
    reads = load.rows * gpu.decode_ms / 1e3 / max(1.0, min(workers or 1, gpu.cores))
    waits = reads if not workers else max(0.0, reads - sum(parts.values()))
    parts["waiting for data"] = waits
    flops = (forward.total_flops + _without_recomputed(forward, backward)) * load.rows / rows
    return StepTime(parts, hidden, reads, flops)


def _without_recomputed(forward: Costs, backward: Costs) -> float:
    """FLOPs of the backward but for what it computes again: for each product of a forward there are two at most."""
    return min(backward.total_flops, 2 * forward.total_flops)


@dataclass(frozen=True)
class _Seconds:
    products: float
    plain: float


def _seconds(gpu: Gpu, costs: Costs, precision: Precision) -> _Seconds:
    """Each operation takes as long as its arithmetic or its memory, and no less than it takes to start one."""
    arithmetic, memory = costs.flops / gpu.product_rate(precision), costs.moved / gpu.memory_rate
    longest = arithmetic.clip(min=memory)
    start = gpu.op_us * MICRO
    # A CPU starts an operation and then does it; a GPU is told of the next one meanwhile.
    each = longest + start if gpu.kind == "cpu" else longest.clip(min=start)
    is_product = costs.flops > 0
    return _Seconds(float(each[is_product].sum()), float(each[~is_product].sum()))


def _comparison(machine: Machine, objective: Objective, config: SimilarityConfig, load: Load) -> float:
    """Products of a rank's rows with all columns and their gradients, and the passes over their tiles."""
    gpu = machine.gpu
    ranks = config.group_ranks or machine.cluster.ranks
    entries = len(objective.pair_terms) * load.rows * min(load.global_batch, load.rows * ranks)
    flops = (_FORWARD_PRODUCTS + _BACKWARD_PRODUCTS) * entries * objective.facts.dim
    product: Precision = "bf16" if config.product == "bf16" else "fp32"
    return max(flops / gpu.product_rate(product), _TILE_PASSES * _BYTES * entries / gpu.memory_rate)


def _travel(machine: Machine, size: float, calls: int) -> float:
    """Bytes that a rank sends in so many collectives; each has as many hops as a tree over the ranks."""
    if not size:
        return 0.0
    hops = math.ceil(math.log2(max(2, machine.cluster.ranks)))
    return size / machine.gpu.wire_rate(machine.cluster.nodes) + calls * hops * machine.gpu.latency_us * MICRO


def _exchange(machine: Machine, objective: Objective, config: SimilarityConfig, load: Load) -> float:
    """What a rank sends of embeddings, ids and sums for each pair term (`vlm.distributed.row_group.RowGroup`)."""
    ranks = config.group_ranks or machine.cluster.ranks
    if ranks == 1 or not objective.pair_terms:
        return 0.0
    wire = 2 if config.wire == "bf16" else _BYTES
    rows, dim, kinds = load.rows, objective.facts.dim, max(1, len(objective.pair_needs.gathered))
    size = (ranks - 1) * rows * (2 * kinds * dim * wire + 12) + 16 * (ranks - 1) / ranks * rows * ranks
    calls = 8
    if config.exchange == "ring":
        size += _BYTES * ranks * rows * dim
        calls += 2 * ranks
    return _travel(machine, size, calls)


def gigabytes(size: float) -> str:
    """A number of bytes as a table shows it."""
    return f"{size / GIGA:,.2f}"
