"""Time and memory of accumulation over micro-batches, beside one full batch.

    python -P -m benchmarks.training.accumulation [--work WORK] [--turns 3]

A ViT (64 px, 8 px patches, width 192, 6 layers) with a text tower of the same width; 512 pairs at once, or in
micro-batches of 128 that are embedded twice, all 512 being negatives of each other. Gradients only: forward, objective,
backward. Time: the ways take turns in one process. Memory: what a fresh process's peak rises above its model.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.processes import apart, peak_above
from benchmarks.result_cache import ResultCache, arguments_of_turns, machine
from vlm.batch import Batch, Images, Texts
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.objectives.objective import Objective
from vlm.training.accumulation import accumulate
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import Engine, EngineSettings
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan

PAIRS, LENGTH = 512, 24
WAYS = {"one batch of 512": None, "4 micro-batches of 128": 128, "8 micro-batches of 64": 64}
ARCHITECTURE = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "head_width": 64, "layers": 6},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}


def start() -> tuple[Engine, Objective, Batch]:
    """A model under its engine, and a batch of noise."""
    settings = EngineSettings("ddp", PAIRS)
    accelerator = start_accelerator(settings)
    model = build_model(ModelConfig.model_validate({"architecture": ARCHITECTURE}), seed=0)
    config = TrainingConfig(global_batch=PAIRS)
    objective = build_objective(config, model, PAIRS, World())
    engine = assemble(config, settings, accelerator, model, objective).engine
    batch = Batch(
        step=0,
        sample_ids=torch.arange(PAIRS),
        keys=("",) * PAIRS,
        parts={
            "image": Images(torch.randint(0, 255, (PAIRS, 3, 64, 64), dtype=torch.uint8)),
            "text": Texts(torch.randint(1, 49000, (PAIRS, LENGTH)), torch.full((PAIRS,), LENGTH)),
        },
    )
    return engine, objective, batch


def seconds(rows: int | None, engine: Engine, objective: Objective, batch: Batch) -> float:
    """One gradient."""
    for parameter in engine.parameters().values():
        parameter.grad = None
    began = time.perf_counter()
    accumulate(engine, objective, batch, MicroBatchPlan(len(batch), 1, rows), seed=0)
    return time.perf_counter() - began


def measure_times(num_turns: int) -> dict[str, list[float]]:
    """Each way's times, turn by turn, after one that is not counted."""
    engine, objective, batch = start()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(num_turns + 1):
        for name, rows in WAYS.items():
            took = seconds(rows, engine, objective, batch)
            if turn:
                times[name].append(took)
    return times


def measure_peak(name: str) -> float:
    """By how many MB one gradient raises this process's peak, weights' gradients included."""
    engine, objective, batch = start()
    seconds(None, engine, objective, batch.take(0, 2))
    return peak_above(lambda: seconds(WAYS[name], engine, objective, batch))


def main() -> None:
    """Measure what is missing, then print the table."""
    arguments = arguments_of_turns(__doc__)
    if arguments.ask:
        functions: dict[str, Callable[[Any], Any]] = {"times": measure_times, "peak": measure_peak}
        what, argument = arguments.ask
        print(json.dumps(functions[what](argument)))
        return
    results = ResultCache(arguments.work, "accumulation", arguments.again)
    times = results("times", lambda: apart("benchmarks.training.accumulation", "times", arguments.turns))
    print(machine(), "\n")
    print("| 512 pairs | s, median (least to most) | of one batch | peak MB |\n|---|---|---|---|")
    whole = statistics.median(times[next(iter(WAYS))])
    for name, found in times.items():
        peak = results(f"peak {name}", partial(apart, "benchmarks.training.accumulation", "peak", name))
        median = statistics.median(found)
        print(f"| {name} | {median:.2f} ({min(found):.2f} to {max(found):.2f}) | {median / whole:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
