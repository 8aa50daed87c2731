"""What `vlm plan` predicts beside what two ranks on this machine take: peak memory, and time of a step.

    python -P -m benchmarks.launch.plan_validation [--time] [--again]

Memory: the most bytes at a time that torch's allocator has given away during three steps (its own profiler,
`profile_memory`, from before the model is built), on the fuller of two gloo ranks, beside the plan for two ranks of the
same recipe. Time, with --time on a quiet machine: a calibration (`vlm plan --calibrate`), then the median of ten steps
behind two that are not counted. Batches are of noise and are there before: waiting for data is no part of it.
Each finished measurement is kept in --work; a script that was stopped goes on.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.result_cache import ResultCache, machine
from launch.parts import engine_settings
from launch.plan.calibrate import calibrated
from launch.plan.duration import Machine
from launch.plan.engines import Cluster
from launch.plan.gpu import Gpu, shipped_gpus
from launch.plan.plan import Plan, Question, make_plan
from launch.recipe import Recipe
from vlm.batch import Batch, Images, Texts
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.training.assembly import assemble, build_objective
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.step import TrainState, train_step

RANKS, LENGTH, SIZE = 2, 32, 64
STEPS_OF_MEMORY, WARM, TIMED = 3, 2, 10
SIZES = {"small": (128, 4), "medium": (256, 6), "large": (512, 8)}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "small, zero1, 64 rows": {"size": "small", "engine": "zero1", "rows": 64},
    "small, fsdp, 64 rows in 4": {"size": "small", "engine": "fsdp", "rows": 64, "micro": 16},
    "medium, zero3, 48 rows": {"size": "medium", "engine": "zero3", "rows": 48},
    "medium, fsdp, 48 rows": {"size": "medium", "engine": "fsdp", "rows": 48},
    "large, zero1, 32 rows in 2": {"size": "large", "engine": "zero1", "rows": 32, "micro": 16},
    "large, zero3, 32 rows in 2": {"size": "large", "engine": "zero3", "rows": 32, "micro": 16},
    "large, ddp, 32 rows, blocks computed again": {"size": "large", "engine": "ddp", "rows": 32, "again": True},
    "medium, fsdp, 48 rows, bf16": {"size": "medium", "engine": "fsdp", "rows": 48, "precision": "bf16"},
    # Not looked at while the rules of the engines were written.
    "medium, zero2, 64 rows in 2": {"size": "medium", "engine": "zero2", "rows": 64, "micro": 32},
    "large, fsdp, 24 rows in 2": {"size": "large", "engine": "fsdp", "rows": 24, "micro": 12},
    "small, zero3, 96 rows, bf16": {"size": "small", "engine": "zero3", "rows": 96, "precision": "bf16"},
}


def recipe_of(size: str, engine: str, rows: int, micro: int | None = None, **others: Any) -> Recipe:
    """A recipe of two towers of transformer blocks; buckets are small, as its weights are."""
    width, layers = SIZES[size]
    vision = {"image_size": SIZE, "patch_size": 8, "width": width, "head_width": 64, "layers": layers}
    text = {"context_length": LENGTH, "vocab_size": 49408, "width": width, "heads": width // 64, "layers": layers}
    values = {
        "run": "runs/plan-validation",
        "model": {"architecture": {"embed_dim": width, "vision_cfg": vision, "text_cfg": text}},
        "data": {"sources": {"noise": {"shards": "noise.tar"}}, "workers": 8},
        "duration": "100 steps",
        "engine": engine,
        "engine_options": {} if engine == "fsdp" else {"bucket_mib": 16},
        "global_batch": RANKS * rows,
        "micro_batch": micro,
        "precision": others.get("precision", "fp32"),
        "activation_checkpointing": ["image", "text"] if others.get("again") else [],
    }
    return Recipe.model_validate(values)


def planned(recipe: Recipe, gpu: Gpu) -> Plan:
    return make_plan(recipe, "validation", Question(Machine(gpu, Cluster(1, RANKS)), compared=False))


def start(recipe: Recipe) -> tuple[TrainState, Batch, MicroBatchPlan]:
    """The state of one rank of two, and its rows of a batch."""
    settings = engine_settings(recipe, recipe.max_grad_norm)
    accelerator = start_accelerator(settings)
    world = World.current(accelerator.device)
    model = build_model(recipe.model, seed=0)
    objective = build_objective(recipe, model, 10**6, world)
    state = assemble(recipe, settings, accelerator, model, objective)
    rows = settings.rows_per_rank
    first = world.rank * rows
    batch = Batch(
        step=0,
        sample_ids=torch.arange(first, first + rows),
        keys=("",) * rows,
        parts={
            "image": Images(torch.randint(0, 255, (rows, 3, SIZE, SIZE), dtype=torch.uint8)),
            "text": Texts(torch.randint(1, 49000, (rows, LENGTH)), torch.full((rows,), LENGTH)),
        },
    )
    state.engine.warm_up(batch, objective.needs.outputs)
    return state, batch, MicroBatchPlan(recipe.global_batch, world.size, recipe.micro_batch)


def peak_bytes(recipe: Recipe) -> float:
    """The most that the allocator has given away during the steps, all that was made before with it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state, batch, plan = start(recipe)
        for step in range(STEPS_OF_MEMORY):
            with record_function("validated step"):
                train_step(state, batch, plan, step, 1e-4)
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begins = min(event.start_ns() for event in events if event.name() == "validated step")
    held = most = 0.0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held) if event.start_ns() >= begins else most
    return most


def step_seconds(recipe: Recipe) -> float:
    """The median time of a step."""
    state, batch, plan = start(recipe)
    times = []
    for step in range(WARM + TIMED):
        began = time.perf_counter()
        train_step(state, batch, plan, step, 1e-4)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM:])


def on_ranks(what: str, configuration: Mapping[str, Any]) -> float:
    """The larger of two ranks' figures, each rank a process of this script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-P", "-m", __spec__.name, "--rank", json.dumps([what, configuration])]
    ranks = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    figures = []
    for process in ranks:
        output, _ = process.communicate(timeout=600)
        if process.returncode:
            sys.exit(f"a rank ended with {process.returncode}")
        figures.append(float(output.splitlines()[-1]))
    return max(figures)


def table(title: str, unit: str, rows: Mapping[str, tuple[float, float]]) -> None:
    print(f"\n| {title} | measured, {unit} | predicted, {unit} | off |\n|---|---|---|---|")
    for name, (measured, predicted) in rows.items():
        print(f"| {name} | {measured:,.1f} | {predicted:,.1f} | {predicted / measured - 1:+.1%} |")
    print(f"| the largest | | | {max(abs(predicted / measured - 1) for measured, predicted in rows.values()):.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--time", action="store_true", help="measure the time of steps too, on a quiet machine")
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured")
    parser.add_argument("--only", help="configurations whose name begins so")
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        what, configuration = arguments.rank
        print({"memory": peak_bytes, "time": step_seconds}[what](recipe_of(**configuration)))
        return
    cache = ResultCache(arguments.work, "plan_validation", arguments.again)
    chosen = {name: one for name, one in CONFIGURATIONS.items() if name.startswith(arguments.only or "")}
    print(machine())
    gpu = shipped_gpus()["h100"].model_copy(update={"kind": "cpu"})  # its figures of time are not looked at
    rows = {
        name: (
            cache(f"memory of {name}", lambda one=one: on_ranks("memory", one)) / 1e6,  # type: ignore[misc]
            planned(recipe_of(**one), gpu).chosen.memory.peak / 1e6,
        )
        for name, one in chosen.items()
    }
    table("memory of a rank", "MB", rows)
    if arguments.time:
        figures = cache("calibration", lambda: calibrated().model_dump(mode="json"))
        gpu = Gpu.model_validate(figures)
        print("\ncalibration: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
        times = {
            name: (
                cache(f"time of {name}", lambda one=one: on_ranks("time", one)) * 1e3,  # type: ignore[misc]
                planned(recipe_of(**one), gpu).chosen.time.seconds * 1e3,
            )
            for name, one in chosen.items()
        }
        table("time of a step", "ms", times)


if __name__ == "__main__":
    main()
