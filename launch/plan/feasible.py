"""Whether the numbers of a recipe go together on a cluster: batches, groups, lanes, shards, workers, cache."""

from collections.abc import Iterator, Sequence

from data.order.order import default_lanes
from launch.findings import Finding
from launch.plan.data_facts import SourceFacts
from launch.plan.duration import Machine, StepTime
from launch.plan.gpu import GIGA
from launch.plan.memory import Load
from launch.recipe import Recipe

_HELD = 2  # batches beside those that workers hold ready
_DESCRIPTORS = 1024  # shards that a process keeps open


def findings_of(
    recipe: Recipe, machine: Machine, load: Load, facts: Sequence[SourceFacts], time: StepTime, image_size: int
) -> list[Finding]:
    """Findings on what the recipe's own numbers mean there."""
    return [
        *_batches(recipe, machine, load),
        *_lanes(recipe, machine, facts),
        *_workers(recipe, machine, load, time, image_size),
        *_cache(recipe, facts),
    ]


def _batches(recipe: Recipe, machine: Machine, load: Load) -> Iterator[Finding]:
    ranks, group = machine.cluster.ranks, recipe.similarity.group_ranks
    words = f"{recipe.global_batch:,} pairs a step on {ranks:,} ranks: {load.rows:,} each"
    micro = "" if load.micro_batches == 1 else f" in {load.micro_batches:,} micro-batches of {load.micro_batch:,}"
    if recipe.global_batch % ranks:
        less = recipe.global_batch // ranks * ranks
        yield Finding("batch", "warn", words + micro + " at most", f"global_batch: {less} gives every rank as many")
    elif load.rows % load.micro_batch:
        yield Finding("batch", "warn", words + micro, f"a micro_batch that divides {load.rows} wastes nothing")
    else:
        yield Finding("batch", "ok", words + micro)
    if group is not None and ranks % group:
        fix = "similarity.group_ranks: a divisor of the ranks"
        yield Finding("groups", "fail", f"{ranks} ranks do not make groups of {group}", fix)


def _lanes(recipe: Recipe, machine: Machine, facts: Sequence[SourceFacts]) -> Iterator[Finding]:
    ranks, lanes = machine.cluster.ranks, recipe.data.lanes or default_lanes(recipe.global_batch)
    if recipe.data.lanes is not None and recipe.global_batch % lanes:
        yield Finding("lanes", "fail", f"{lanes} do not divide a batch of {recipe.global_batch}", "data.lanes: null")
        return
    each = -(-lanes // ranks)
    yield Finding(
        "lanes",
        "ok",
        f"{lanes:,} lanes, {each:,} a rank, which reads {each * recipe.data.shuffle_shards:,} "
        "shards of a source at a time",
    )
    for source in facts:
        if source.problem:
            yield Finding("data", "warn", f"{source.name}: {source.problem}", "vlm data index, or say --samples")
        elif source.shards < ranks:
            words = f"{source.name}: {source.shards:,} shards for {ranks:,} ranks: several read the same shard"
            remote = source.remote
            fix = "smaller shards, so that each node fetches a part of the data alone"
            yield Finding("data", "warn" if remote else "ok", words, fix)
        else:
            known = f", {source.samples:,} samples" if source.samples is not None else ""
            yield Finding("data", "ok", f"{source.name}: {source.shards:,} shards{known}")


def _workers(recipe: Recipe, machine: Machine, load: Load, time: StepTime, image_size: int) -> Iterator[Finding]:
    workers, cores = recipe.data.workers, machine.gpu.cores
    step = time.seconds - time.parts["waiting for data"]
    needed = time.reads * max(1.0, min(workers or 1, cores)) / max(step, 1e-9)
    words = f"{workers} a rank beside {cores:g} cores; the step needs {needed:.1f} of them"
    if needed > cores:
        fix = "store smaller images (vlm data build --size), or machines with more cores for each GPU"
        yield Finding("workers", "warn", words, fix)
    elif workers < needed:
        yield Finding("workers", "warn", words, f"data.workers: {int(needed) + 1}")
    elif workers > cores:
        yield Finding("workers", "warn", words, f"data.workers: {max(1, int(cores))}")
    else:
        yield Finding("workers", "ok", words)
    held = (workers * recipe.data.prefetch + _HELD) * load.rows * 3 * image_size**2 if recipe.data.images else 0
    on_node = held * machine.cluster.per_node / GIGA
    yield Finding("host memory", "ok", f"{on_node:,.1f} GB a node for batches held ready")


def _cache(recipe: Recipe, facts: Sequence[SourceFacts]) -> Iterator[Finding]:
    remote = [source for source in facts if source.remote and source.bytes]
    size = sum(source.bytes or 0 for source in remote)
    if not size:
        return
    limit = recipe.data.cache.limit
    words = f"{size / GIGA:,.0f} GB of remote shards, {limit / GIGA:,.0f} GB of copies a node"
    if limit < size:
        fix = f"data.cache.limit: {size // 10**9 + 1}GB, or more nodes: else every epoch fetches shards again"
        yield Finding("cache", "warn", words, fix)
    else:
        yield Finding("cache", "ok", words)
