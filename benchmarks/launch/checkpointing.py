"""Time and memory of a gradient whose blocks keep their input alone, beside one that keeps all activations.

    python -P -m benchmarks.launch.checkpointing [--work WORK] [--turns 3]

A ViT (64 px, 8 px patches, width 192, 6 layers) with a text tower of 4 layers of the same width; 128 pairs in one
batch; forward, objective, backward. Time is that of the processor; the ways take turns in one process. Memory: what
autograd keeps of the forward beside the weights, and what a fresh process's peak rises above its model, gradients
included. That the gradients are the same bit for bit is compared in the first turn.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.processes import apart, peak_above
from benchmarks.result_cache import ResultCache, arguments_of_turns, machine
from vlm.batch import Batch, Images, Texts
from vlm.distributed.world import World
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.objectives.objective import Objective
from vlm.outputs import PAIR
from vlm.training.accumulation import accumulate
from vlm.training.assembly import assemble, build_objective
from vlm.training.config import TrainingConfig
from vlm.training.engines.base import Engine, EngineSettings
from vlm.training.engines.start import start_accelerator
from vlm.training.micro_batches import MicroBatchPlan

PAIRS, LENGTH = 128, 24
WAYS: dict[str, tuple[str, ...]] = {
    "none": (),
    "image": ("image",),
    "text": ("text",),
    "image, text": ("image", "text"),
}
ARCHITECTURE = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "head_width": 64, "layers": 6},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}


def start(parts: tuple[str, ...]) -> tuple[Engine, Objective]:
    """A model under its engine, the blocks of some parts keeping their input alone."""
    settings = EngineSettings("ddp", PAIRS)
    model = build_model(ModelConfig.model_validate({"architecture": ARCHITECTURE}), seed=0)
    config = TrainingConfig.model_validate({"global_batch": PAIRS, "activation_checkpointing": parts})
    objective = build_objective(config, model, PAIRS, World())
    return assemble(config, settings, start_accelerator(settings), model, objective).engine, objective


def batch_of_noise() -> Batch:
    """The same pairs every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (PAIRS, 3, 64, 64), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49000, (PAIRS, LENGTH), generator=generator)
    parts = {"image": Images(images), "text": Texts(tokens, torch.full((PAIRS,), LENGTH))}
    return Batch(step=0, sample_ids=torch.arange(PAIRS), keys=("",) * PAIRS, parts=parts)


def gradient(engine: Engine, objective: Objective, batch: Batch) -> float:
    """Processor seconds of one gradient."""
    for parameter in engine.parameters().values():
        parameter.grad = None
    began = time.process_time()
    accumulate(engine, objective, batch, MicroBatchPlan(len(batch), 1), seed=0)
    return time.process_time() - began


def measure_times(num_turns: int) -> dict[str, Any]:
    """Each way's times, turn by turn, after one that is not counted; and whose gradients are those of the first way."""
    batch, ways = batch_of_noise(), {name: start(parts) for name, parts in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    gradients: dict[str, dict[str, Tensor]] = {}
    for turn in range(num_turns + 1):
        for name, (engine, objective) in ways.items():
            took = gradient(engine, objective, batch)
            if turn:
                times[name].append(took)
            else:
                gradients[name] = {key: engine.gradient(key) for key in engine.parameters()}
    kept = gradients["none"]
    same = {name: all(torch.equal(tensor, kept[key]) for key, tensor in of.items()) for name, of in gradients.items()}
    return {"times": times, "same": same}


def measure_peak(way: str) -> tuple[float, float]:
    """MB that autograd keeps of the forward, and by which one gradient raises this process's peak."""
    (engine, objective), batch = start(WAYS[way]), batch_of_noise()
    gradient(engine, objective, batch.take(0, 2))
    peak = peak_above(lambda: gradient(engine, objective, batch))
    weights = {parameter.data_ptr() for parameter in engine.module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = engine.forward(batch, PAIR)  # alive, so that no place in memory is counted twice
    assert made
    return sum(kept.values()) / 1e6, peak


def main() -> None:
    arguments = arguments_of_turns(__doc__)
    torch.set_num_threads(1)
    if arguments.ask is not None:
        what, argument = arguments.ask
        asked: dict[str, Callable[[Any], Any]] = {"times": measure_times, "peak": measure_peak}
        print(json.dumps(asked[what](argument)))
        return
    cache = ResultCache(arguments.work / "checkpointing", "checkpointing", arguments.again)
    ask = partial(apart, "benchmarks.launch.checkpointing")
    told = cache(f"times, {arguments.turns} turns", partial(ask, "times", arguments.turns))
    peaks = {way: cache(f"peak, {way}", partial(ask, "peak", way)) for way in WAYS}
    medians = {way: statistics.median(times) for way, times in told["times"].items()}
    print(f"{machine()}; {PAIRS} pairs, one thread, {arguments.turns} interleaved turns\n")
    print("| activation_checkpointing | core s, median (least to most) | of none | kept MB | peak MB | the same bits |")
    print("|---|---|---|---|---|---|")
    for way, times in told["times"].items():
        span = f"{medians[way]:.2f} ({min(times):.2f} to {max(times):.2f})"
        figures = f"{medians[way] / medians['none']:.2f} | {peaks[way][0]:.0f} | {peaks[way][1]:.0f}"
        print(f"| {way} | {span} | {figures} | {'yes' if told['same'][way] else 'NO'} |")


if __name__ == "__main__":
    main()
