"""The losses alone, forward and backward, beside open_clip's: seconds and memory of the device by number of pairs."""

import statistics
import time
from typing import Any

import torch

from benchmarks.gpu.setting import Setting, noted_warnings
from benchmarks.loss.ways import Leaves, Way, leaves, ways
from vlm.distributed.world import World

NAMES = (
    "clip bf16",
    "open_clip ClipLoss bf16",
    "clip fp32",
    "open_clip ClipLoss fp32",
    "sigmoid bf16",
    "open_clip SigLipLoss bf16",
)
_TURNS = 3
_SCALE, _BIAS = 14.3, -10.0


def measure_losses(device: str, quick: bool, pairs: int, seconds: float) -> dict[str, Any]:
    """Each way's median seconds and peak bytes above its inputs, at 512 dimensions; in words where there are none."""
    setting, until = Setting(device, quick), time.perf_counter() + seconds
    world = World(device=setting.place)
    rows = leaves(pairs, _SCALE, _BIAS, world)
    known, figures = ways(world), {}
    with noted_warnings() as notes:
        for name in NAMES:
            if time.perf_counter() > until:
                figures[name] = {"words": "no time left"}
                continue
            try:
                figures[name] = _figures(known[name], rows, world, setting)
            except torch.OutOfMemoryError:
                figures[name] = {"words": "no memory"}
            for leaf in rows.values():
                leaf.grad = None
            if device == "cuda":
                torch.cuda.empty_cache()
    return {"ways": figures, "notes": notes}


def _figures(way: Way, rows: Leaves, world: World, setting: Setting) -> dict[str, Any]:
    def once() -> float:
        for leaf in rows.values():
            leaf.grad = None
        setting.wait()
        began = time.perf_counter()
        way(rows, world).backward()
        setting.wait()
        return time.perf_counter() - began

    once()  # kernels are compiled, and chosen
    if setting.device != "cuda":
        return {"seconds": statistics.median(once() for _ in range(_TURNS)), "peak": 0}
    for leaf in rows.values():
        leaf.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(once() for _ in range(_TURNS))
    return {"seconds": seconds, "peak": torch.cuda.max_memory_allocated() - before}
