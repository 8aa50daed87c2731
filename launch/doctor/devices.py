"""Drivers, GPUs and cores: what this rank computes on, and whether others compute on the same."""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch

from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding
from vlm.training.precision import slow_precision

_DRIVER = Path("/proc/driver/nvidia/version")
_SIZE, _TIMES = 1024, 7
_SLOW = 1.5  # times as long as the median rank


@CHECKS.register("devices")
class Devices(Check):
    """The device of each rank, and how long each takes for the same products."""

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        yield from _gpu(place) if torch.cuda.is_available() else _cpu(place)
        seconds = place.world.gather_objects(_product_seconds(place.device))
        median = sorted(seconds)[len(seconds) // 2]
        slow = [rank for rank, one in enumerate(seconds) if one > _SLOW * median]
        words = f"products of {_SIZE} x {_SIZE} take {median * 1e3:,.2f} ms"
        if slow and place.world.size > 1:
            worst = max(slow, key=lambda rank: seconds[rank])
            words += f", on rank {worst} {seconds[worst] / median:.1f} times as long: every step waits for it"
            yield Finding("devices", "warn", words, "look at what else runs on its machine, or leave that out")
        else:
            yield Finding("devices", "ok", words)


def _gpu(place: Place) -> Iterator[Finding]:
    local, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if local > count:
        words = f"{local} ranks on a machine with {count} GPUs"
        yield Finding("devices", "fail", words, f"torchrun --nproc-per-node {count}")
    name = torch.cuda.get_device_name(place.device)
    free, total = torch.cuda.mem_get_info(place.device)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    words = f"{name}, {total / 1e9:,.0f} GB, CUDA {torch.version.cuda}, NCCL {nccl}"
    if free < 0.9 * total:
        fix = "end what else runs on it (nvidia-smi)"
        yield Finding("devices", "warn", f"{words}: only {free / 1e9:,.0f} GB are free", fix)
    else:
        yield Finding("devices", "ok", words)
    is_bf16 = place.recipe is not None and place.recipe.decided_precision == "bf16"
    if is_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("devices", "warn", f"{name} has no bf16 in hardware", "precision: fp32")


def _cpu(place: Place) -> Iterator[Finding]:
    cores = len(psutil.Process().cpu_affinity() or [1])
    ranks, threads = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.get_num_threads()
    if _DRIVER.exists():
        words = f"there is a driver ({_DRIVER.read_text().splitlines()[0][:80]}), and torch sees no GPU"
        yield Finding("devices", "fail", words, "a torch built for CUDA, and CUDA_VISIBLE_DEVICES that names GPUs")
    words = f"no GPU: {ranks} rank{'s' * (ranks > 1)}, {threads} thread{'s' * (threads > 1)} each, on {cores} cores"
    if ranks * threads > cores:
        yield Finding("devices", "warn", words, f"OMP_NUM_THREADS={max(1, cores // ranks)}")
    else:
        yield Finding("devices", "ok", words)
    slow = None if place.recipe is None else slow_precision(place.recipe.decided_precision)
    if slow is not None:
        yield Finding("devices", "warn", slow, "precision: auto")


def _product_seconds(device: torch.device) -> float:
    """The median time of a product."""
    a = torch.ones(_SIZE, _SIZE, device=device)
    times = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[_TIMES // 2]
