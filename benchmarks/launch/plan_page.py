"""The page docs/plan.md: what the plan says of ViT-B/32 to ViT-g/14 on 8 to 4,096 GPUs, all of it predicted.

    python -P -m benchmarks.launch.plan_page > docs/plan.md

For each model and number of GPUs the simplest way that is about as fast as the fastest: of all engines, with blocks
kept or computed again, and micro-batches of the largest power of two that fits.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

from launch.parts import rows_per_rank
from launch.plan.duration import Machine
from launch.plan.engines import ENGINES, Cluster
from launch.plan.gpu import gpu_named
from launch.plan.memory import Load
from launch.plan.model import PlannedModel, plan_model
from launch.plan.plan import Way, way_of
from launch.recipe import Recipe

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-g-14")
GPUS, PER_NODE, SEEN = (8, 64, 512, 4096), 8, 12.8e9
COLUMNS = (
    *("model", "GPUs", "pairs a step", "engine", "blocks", "micro-batch", "GB a GPU", "s a step", "samples/s", "MFU"),
    *("days", "GPU-hours", "most goes into"),
)
NEARLY = 1.03  # times the fastest: a simpler way is taken
_DAY, _HOUR = 86_400, 3_600

_HEAD = """# What runs take, predicted

Nothing on this page was run: it is what `vlm plan` says. Made by

    python -P -m benchmarks.launch.plan_page > docs/plan.md

for H100s (80 GB, 8 a node, 400 Gbit/s each between nodes; the figures are in `launch/plan/gpus.yaml`),
`precision: bf16`, `objective: clip`, `similarity.product: bf16`, AdamW, 12.8 G samples seen. Each line is the simplest
way (ddp before zero1 to zero3 before fsdp, blocks kept before computed again by `activation_checkpointing`) that fits
and takes at most 3 % longer than the fastest, in micro-batches of the largest power of two that fits.

The model is open_clip's own, run forward and backward without its memory; FLOPs are by torch's formulas, and MFU counts
none that are computed again. Products are taken to reach 60 % of the peak, other operations 80 % of the memory's
bandwidth and each 6 us at least, links 75 % of theirs, and communication to hide behind 80 % of the computing: real
runs differ by what these differ. A core decodes a sample in 1.5 ms, with 14 cores a GPU. What memory comes to is
compared with real ranks in [benchmarks/launch](../benchmarks/launch/RESULTS.md#a-plan-beside-what-is-measured).

One's own recipe, machine and price: `vlm plan RECIPE --nodes 16 --gpus-per-node 8 --gpu h100 --price 2.5`.
"""


def recipe_of(model: str, global_batch: int) -> Recipe:
    return Recipe.model_validate(
        {
            "run": "runs/planned",
            "model": {"open_clip": model},
            "data": {"sources": {"web": {"shards": "web.tar"}}, "workers": 14},
            "duration": f"{SEEN:.0f} samples",
            "global_batch": global_batch,
            "precision": "bf16",
            "similarity": {"product": "bf16"},
        }
    )


def ways(recipe: Recipe, models: dict[tuple[str, ...], PlannedModel], machine: Machine) -> Iterator[tuple[Way, Load]]:
    """All ways that fit, with their micro-batches."""
    rows = rows_per_rank(recipe.global_batch, machine.cluster.ranks)
    for parts, model in models.items():
        for engine in ENGINES:
            load = Load(rows, rows, recipe.global_batch)
            largest = way_of(recipe, machine, engine, parts, model, load).largest_micro_batch
            if largest is not None:
                load = replace(load, micro_batch=largest)
                yield way_of(recipe, machine, engine, parts, model, load), load


def line(model: str, gpus: int, global_batch: int, models: dict[tuple[str, ...], PlannedModel]) -> str:
    recipe = recipe_of(model, global_batch)
    machine = Machine(gpu_named("h100"), Cluster(gpus // PER_NODE, PER_NODE))
    fitting = list(ways(recipe, models, machine))
    fastest = min(way.time.seconds for way, _ in fitting)
    way, load = next(one for one in fitting if one[0].time.seconds <= NEARLY * fastest)
    seconds = way.time.seconds
    mfu = way.time.model_flops / seconds / machine.gpu.peak_rate("bf16")
    days = recipe.duration.steps(global_batch, 1) * seconds / _DAY
    cells = (
        model,
        f"{gpus:,}",
        f"{global_batch:,}",
        way.engine,
        "again" if way.recomputed else "kept",
        f"{load.micro_batch:,} of {load.rows:,}",
        f"{way.memory.peak / 1e9:.1f}",
        f"{seconds:.3g}",
        f"{global_batch / seconds:,.0f}",
        f"{mfu:.0%}",
        f"{days:,.2f}",
        f"{days * _DAY / _HOUR * gpus:,.0f}",
        way.time.bottleneck,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(_HEAD)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for model in MODELS:
        recipe = recipe_of(model, 32_768)
        variants: tuple[tuple[str, ...], ...] = ((), ("image", "text"))
        models = {parts: plan_model(recipe, parts, samples=10**9, length=None) for parts in variants}
        for gpus in GPUS:
            print(line(model, gpus, 32_768 if gpus <= 512 else 131_072, models))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
