"""Time and memory of a step with a captioning decoder, beside the step with the contrastive loss alone.

    python -P -m benchmarks.captions.flickr8k_cost [--work WORK] [--turns 7]

The two recipes of `benchmarks.captions.flickr8k`, read from its folder WORK, each with the same batch of training
samples: forward, backward and the optimizer's step, the two in turns, in one process on one core. Memory is what a step
of a fresh process raises its peak by, beyond model and moments.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.processes import apart, peak_above
from benchmarks.result_cache import ResultCache, arguments_of_turns, machine
from launch.parts import engine_settings, open_stream
from launch.recipe import load_recipe
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.training.assembly import assemble, build_objective
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.step import train_step

VARIANTS = ("contrastive", "captioner")


def stepper(file: str) -> Callable[[], None]:
    """One step of a recipe on its first batch, after one that is not counted."""
    torch.set_num_threads(1)
    recipe = load_recipe(file, ["data.workers=0"])
    settings = engine_settings(recipe, recipe.max_grad_norm)
    accelerator, model = start_accelerator(settings), build_model(recipe.model)
    source = open_stream(recipe, model, World(), record=False)
    objective = build_objective(recipe, model, source.num_samples, World())
    state = assemble(recipe, settings, accelerator, model, objective)
    batch = next(iter(source.batches(0, 1)))
    plan = MicroBatchPlan(recipe.global_batch, 1)
    model.train()

    def step() -> None:
        train_step(state, batch, plan, recipe.seed, 1e-4)

    step()
    return step


def measure_times(files: list[str], num_turns: int) -> list[list[float]]:
    """The seconds of each recipe's steps, turn by turn."""
    steps = [stepper(file) for file in files]
    times: list[list[float]] = [[] for _ in files]
    for _ in range(num_turns):
        for own, step in zip(times, steps, strict=True):
            began = time.process_time()
            step()
            own.append(time.process_time() - began)
    return times


def main() -> None:
    """Measure what is missing, then print the table."""
    arguments = arguments_of_turns(__doc__)
    if arguments.ask:
        what, argument = arguments.ask
        print(json.dumps(measure_times(*argument) if what == "times" else peak_above(stepper(argument))))
        return
    files = [next(iter(sorted(arguments.work.glob(f"{variant}-*.yaml"))), None) for variant in VARIANTS]
    if None in files:
        sys.exit(f"{arguments.work}: no recipe of benchmarks.captions.flickr8k; --work names its folder")
    names = [str(file) for file in files]
    results = ResultCache(arguments.work, "flickr8k-cost", arguments.again)
    ask = partial(apart, "benchmarks.captions.flickr8k_cost")
    times = results("times", partial(ask, "times", [names, arguments.turns]))
    peaks = [
        results(f"peak {variant}", partial(ask, "peak", name)) for variant, name in zip(VARIANTS, names, strict=True)
    ]
    print(machine(), "\n")
    print("| step of 64 pictures | core seconds, median (least to most) | of the contrastive step's | peak MB |")
    print("|---|---|---|---|")
    for variant, found, peak in zip(VARIANTS, times, peaks, strict=True):
        median = statistics.median(found)
        shown = f"{median:.2f} ({min(found):.2f} to {max(found):.2f}) | {median / statistics.median(times[0]):.2f}"
        print(f"| {variant} | {shown} | {peak:.0f} |")


if __name__ == "__main__":
    main()
