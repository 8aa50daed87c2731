"""A plan as lines and tables, and as JSON."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from launch.plan.duration import StepTime
from launch.plan.gpu import GIGA, Gpu
from launch.plan.plan import Plan, Way
from vlm.terminal import Terminal

_REMEDIES = {
    "products": "computing: precision bf16, a smaller model or fewer pixels, or more GPUs",
    "plain operations": "memory bandwidth and starting operations: a larger micro_batch",
    "embedding before": "the first pass of micro-batches: a larger micro_batch, so that one is enough",
    "comparison of pairs": "the loss: precision or similarity.product: bf16",
    "update": "the update of the weights: an engine that shares it (zero1, fsdp)",
    "gradients between ranks": "the reduction of gradients: a larger batch, or engine_options.wire: bf16",
    "weights between ranks": "the gathering of weights: a larger micro_batch, or zero1 where the weights fit",
    "embeddings between ranks": "the exchange of embeddings: similarity.wire: bf16",
    "waiting for data": "data supply: more data.workers and cores, or smaller stored images",
}


def print_plan(plan: Plan, console: Terminal) -> None:
    """The plan as tables and lines."""
    for line in _head(plan):
        console.print(line, soft_wrap=True)
    for table in (_ways(plan), _memory(plan), _time(plan.chosen.time)):
        console.print(table)
    for line in (*_end(plan), *(finding.line for finding in plan.findings)):
        console.print(line, soft_wrap=True)


def _head(plan: Plan) -> Iterator[str]:
    gpu, cluster, sizes = plan.machine.gpu, plan.machine.cluster, plan.sizes
    yield (
        f"predicted, nothing was run: {plan.recipe} on {cluster.nodes:,} x {cluster.per_node:,} {gpu.name} "
        f"({gpu.memory_gb:g} GB, {gpu.reserved_gb:g} of them reserved), precision {plan.precision}"
    )
    yield (
        f"{sizes.weights // 4:,} parameters, {sizes.trained // 4:,} trained; {plan.load.global_batch:,} pairs a step, "
        f"{plan.load.rows:,} a rank, micro-batches of {plan.load.micro_batch:,}, texts of {plan.length} tokens"
    )
    if gpu.note:
        yield f"{gpu.name}: {gpu.note}"


def _ways(plan: Plan) -> Table:
    table = Table("engine", "blocks", title="Engines", padding=(0, 0))  # fits into 80 columns
    for name in ("GB a rank", "fits", "micro-batch up to", "s a step", "samples/s"):
        table.add_column(name, justify="right")
    for way in plan.ways:
        largest = "none" if way.largest_micro_batch is None else f"{way.largest_micro_batch:,}"
        table.add_row(
            f"{way.engine}{' *' if way is plan.chosen else ''}",
            _blocks(way),
            f"{way.memory.peak / GIGA:,.2f}",
            "yes" if way.fits else "no",
            largest,
            f"{way.time.seconds:,.3g}",
            f"{plan.load.global_batch / way.time.seconds:,.0f}",
        )
    return table


def _blocks(way: Way) -> str:
    return "computed again" if way.recomputed else "kept"


def _memory(plan: Plan) -> Table:
    ways = [way for way in plan.ways if way.engine == plan.chosen.engine]
    table = Table("GB a rank", title=f"Memory under {plan.chosen.engine}")
    for way in ways:
        table.add_column(_blocks(way), justify="right")
    names = dict.fromkeys(name for way in ways for name in way.memory.parts)
    for name in names:
        table.add_row(name, *(f"{way.memory.parts.get(name, 0.0) / GIGA:,.3f}" for way in ways))
    table.add_row("all, at the peak", *(f"{way.memory.peak / GIGA:,.3f}" for way in ways))
    for part in dict.fromkeys(part for way in ways for part in way.kept if part != "rest"):
        table.add_row(f"kept by the {part}", *(f"{way.kept.get(part, 0.0) / GIGA:,.3f}" for way in ways))
    if plan.logits:
        table.add_row("decoder logits, a chunk", *(f"{plan.logits / GIGA:,.3f}" for _ in ways))
    if plan.chosen.memory.host:
        table.add_row("in the node's memory", *(f"{way.memory.host / GIGA:,.3f}" for way in ways))
    return table


def _time(time: StepTime) -> Table:
    table = Table("a step", title="Time")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in time.parts.items():
        if seconds:
            table.add_row(name, f"{seconds * 1e3:,.2f}", f"{seconds / time.seconds:.1%}")
    for name, seconds in time.hidden.items():
        if seconds:
            table.add_row(f"{name}, beside computing", f"({seconds * 1e3:,.2f})", "")
    return table


def _end(plan: Plan) -> Iterator[str]:
    time, ranks = plan.chosen.time, plan.machine.cluster.ranks
    yield (
        f"a step takes {time.seconds:,.4g} s: {plan.samples_a_second:,.0f} samples/s, "
        f"{plan.samples_a_second / ranks:,.1f} a GPU, MFU {plan.mfu:.1%}"
    )
    yield f"the bottleneck is {_REMEDIES[time.bottleneck]}"
    if plan.days is None or plan.gpu_hours is None or plan.num_steps is None:
        yield "how long the run takes is not known: nothing says how many samples an epoch has (--samples)"
        return
    money = "" if plan.cost is None else f", {plan.cost:,.0f} at {plan.price:g} a GPU-hour"
    yield f"the run takes {plan.num_steps:,} steps, {plan.days:,.2f} days, {plan.gpu_hours:,.1f} GPU-hours{money}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan in plain values: bytes, seconds and shares."""
    gpu: Gpu = plan.machine.gpu
    return {
        "predicted": True,
        "recipe": plan.recipe,
        "gpu": gpu.model_dump(mode="json"),
        "nodes": plan.machine.cluster.nodes,
        "gpus_per_node": plan.machine.cluster.per_node,
        "precision": plan.precision,
        "parameters": plan.sizes.weights // 4,
        "trained": plan.sizes.trained // 4,
        "global_batch": plan.load.global_batch,
        "rows_per_rank": plan.load.rows,
        "micro_batch": plan.load.micro_batch,
        "engine": plan.chosen.engine,
        "samples_per_second": plan.samples_a_second,
        "mfu": plan.mfu,
        "steps": plan.num_steps,
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "cost": plan.cost,
        "bottleneck": plan.chosen.time.bottleneck,
        "engines": [_way_as_json(way) for way in plan.ways],
        "findings": [
            {"check": one.check, "state": one.state, "found": one.words, "fix": one.fix} for one in plan.findings
        ],
    }


def _way_as_json(way: Way) -> dict[str, Any]:
    return {
        "engine": way.engine,
        "recomputed": list(way.recomputed),
        "bytes": way.memory.peak,
        "bytes_by_part": dict(way.memory.parts),
        "bytes_kept": dict(way.kept),
        "peak_in": way.memory.phase,
        "host_bytes": way.memory.host,
        "fits": way.fits,
        "largest_micro_batch": way.largest_micro_batch,
        "seconds": way.time.seconds,
        "seconds_by_part": dict(way.time.parts),
        "seconds_hidden": dict(way.time.hidden),
    }
