"""A training step in bf16 beside open_clip's, in turns: seconds, FLOPs and memory of the device."""

import gc
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.setting import Setting, noted_warnings
from benchmarks.step.systems import Own, Peer, batches
from vlm.batch import Batch

OWN, PEER = "vlm", "open_clip"
_PLAIN = {"vlm, compiled": OWN, "open_clip, compiled": PEER}  # whose FLOPs a compiled step has, which cannot be counted
_IN_A_ROW = 3  # steps of a way before the next one's turn
_MOST_TURNS = 8
Step = partial[Any]


def measure_steps(
    device: str, quick: bool, model: str, sizes: Sequence[int], ways: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Each way's figures with the largest of these batches that all have room for, as many turns as there is time for.

    Captions are as long as the web's. open_clip has TF32 and cuDNN's trials, as its script does, and gets pixels that
    are normalised. FLOPs are those that a step does, by torch's formulas: what pads rows counts for who computes it.
    """
    setting, until = Setting(device, quick), time.perf_counter() + seconds
    for pairs in sizes:
        try:
            with noted_warnings() as notes:
                figures = _measured(setting, model, pairs, ways, until)
            return {"pairs": pairs, "ways": figures, "notes": notes}
        except torch.OutOfMemoryError:
            problem = f"no memory for {pairs} pairs"
        # Outside the handler, whose traceback holds what has been allocated.
        gc.collect()
        torch.cuda.empty_cache()
    raise MemoryError(problem)


def _measured(setting: Setting, model: str, pairs: int, ways: Sequence[str], until: float) -> dict[str, Any]:
    source = batches(model, None, pairs=pairs)
    ready = [next(source).to(setting.place) for _ in range(_IN_A_ROW)]
    steps: dict[str, list[Step]] = {}
    figures: dict[str, Any] = {}
    for way in ways:
        flops = _flops(_made(setting, model, pairs, _PLAIN[way], ready)[0]) if way in _PLAIN else None
        gc.collect()
        before = _allocated(setting)
        several = steps[way] = _made(setting, model, pairs, way, ready)
        began = time.perf_counter()
        several[0]()  # compiles, and tries kernels
        setting.wait()
        figures[way] = {"first": time.perf_counter() - began}
        figures[way] |= {"flops": flops or _flops(several[0])}
        for step in several:
            step()
        setting.wait()
        inputs = sum(part.nbytes for step in several for part in step.args if isinstance(part, Tensor))
        figures[way] |= {"kept": _allocated(setting) - before - inputs}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(_MOST_TURNS):
        if turn > 1 and time.perf_counter() > until:
            break
        first = turn % len(ways)
        for way in (*ways[first:], *ways[:first]):
            setting.wait()
            began = time.perf_counter()
            for step in steps[way]:
                step()
            setting.wait()
            times[way].append((time.perf_counter() - began) / len(ready))
    for way in ways:
        spread = {"least": min(times[way]), "most": max(times[way])}
        figures[way] |= {
            "seconds": statistics.median(times[way]),
            **spread,
            "peak": _peak(steps[way][0], setting),
        }
    return figures


def _made(setting: Setting, model: str, pairs: int, way: str, batches: Sequence[Batch]) -> list[Step]:
    """A step of a way on each batch, which it is given as it wants it."""
    compiled = way in _PLAIN
    if _PLAIN.get(way, way) == OWN:
        own = Own(model, {"compile": ("image", "text")} if compiled else {}, pairs)
        return [partial(own, batch) for batch in batches]
    peer = Peer(model, setting.device, compiled=compiled)

    def step(pixels: Tensor, tokens: Tensor) -> None:
        kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
        peer.step(pixels, tokens)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = kept

    return [partial(step, *peer.prepare(batch)) for batch in batches]


def _flops(step: Step) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def _allocated(setting: Setting) -> int:
    return torch.cuda.memory_allocated() if setting.device == "cuda" else 0


def _peak(step: Step, setting: Setting) -> int:
    """Bytes that a step takes above what all models together hold between steps."""
    if setting.device != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
