"""Cost of counting: a training step with 1/32 of counting samples and their loss, beside the plain step.

    python -P -m benchmarks.counting.cost [--work WORK] [--turns 9]

The demo's towers without decoder, 128 scenes a step on one core. Both runs read the same shards; in one of them a
thirty-second of each batch is from a counting set, whose captions go through the text tower once more with another
number, and the counting loss stands beside the contrastive one. Loading is not counted. The two take turns in one
process, each with the same eight batches a turn; times are those that the process had the core.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.counting.scenes import prepare
from benchmarks.processes import apart
from benchmarks.result_cache import ResultCache, arguments_of_turns, machine
from launch.parts import engine_settings, open_stream
from launch.recipe import check_recipe
from launch.recipe_file import read_recipe
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.training.assembly import assemble, build_objective
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.step import train_step

BATCHES = 8


def values_of(work: Path, sources: dict[str, str], *, counting: bool) -> dict[str, Any]:
    """A recipe with the counting set and its loss, or plain."""
    _, values = read_recipe("scenes", ["trackers=[]", "model.captioner=none"])
    data: dict[str, Any] = {"web": {"shards": sources["web"]}}
    if counting:
        data["counting"] = {"shards": sources["counted"], "counterfactuals": "number"}
    objective = {"clip": 1.0, "counting": {"scale": "logit_scale"}} if counting else {"clip": 1.0}
    values |= {"run": str(work / "cost"), "evaluate": {}, "objective": objective}
    values["data"] |= {"sources": data, "counterfactuals": None, "workers": 0}
    return values


def stepper(values: dict[str, Any]) -> Callable[[], None]:
    """Eight steps of a recipe, after eight that are not counted."""
    recipe = check_recipe(values, "scenes")
    settings = engine_settings(recipe, recipe.max_grad_norm)
    accelerator, model = start_accelerator(settings), build_model(recipe.model)
    source = open_stream(recipe, model, World(), record=False)
    objective = build_objective(recipe, model, source.num_samples, World())
    state = assemble(recipe, settings, accelerator, model, objective)
    batches, plan = list(source.batches(0, BATCHES)), MicroBatchPlan(recipe.global_batch, 1)
    model.train()

    def steps() -> None:
        for batch in batches:
            train_step(state, batch, plan, recipe.seed, 1e-4)

    steps()
    return steps


def measure(work: str, num_turns: int) -> list[list[float]]:
    """The seconds of a step of each, turn by turn: plain, and with counting."""
    torch.set_num_threads(1)
    sources = prepare(Path(work))
    both = [stepper(values_of(Path(work), sources, counting=counting)) for counting in (False, True)]
    times: list[list[float]] = [[], []]
    for turn in range(num_turns):
        for number in (0, 1) if turn % 2 else (1, 0):
            began = time.process_time()
            both[number]()
            times[number].append((time.process_time() - began) / BATCHES)
    return times


def main() -> None:
    """Measure what is missing, then print the table."""
    arguments = arguments_of_turns(__doc__)
    if arguments.ask:
        print(json.dumps(measure(*arguments.ask[1])))
        return
    work = arguments.work.resolve()
    results = ResultCache(work, "counting-cost", arguments.again)
    ask = partial(apart, "benchmarks.counting.cost")
    plain, counting = results("times", lambda: ask("times", [str(work), arguments.turns]))
    print(machine(), "\n")
    print("| step of 128 scenes | core seconds, median (least to most) | of the plain step |\n|---|---|---|")
    for name, times in (("plain", plain), ("1/32 counting samples", counting)):
        ratios = [one / other for one, other in zip(times, plain, strict=True)]
        spread = f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"
        print(f"| {name} | {spread} | {statistics.median(ratios):.3f} |")


if __name__ == "__main__":
    main()
