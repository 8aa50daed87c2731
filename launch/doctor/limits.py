"""Limits of the system: open files, shared memory, and the node's memory for batches held ready."""

import os
import resource
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch

from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding
from launch.parts import rows_per_rank

_OPEN_SHARDS, _OTHERS = 1024, 512
_SHARED = 2**30  # that NCCL and a container's own processes want together
_HELD = 2
_SHM = Path("/dev/shm")


@CHECKS.register("limits")
class Limits(Check):
    """What each rank's system allows, beside what a run asks for."""

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield open_files(soft, hard)
        if _SHM.is_dir():
            yield shared_memory(shutil.disk_usage(_SHM).free, on_gpu=torch.cuda.is_available())
        if place.recipe is not None:
            yield from _batches(place)


def open_files(soft: int, hard: int) -> Finding:
    """The finding on a limit of open files; a loading process keeps up to 1,024 shards open."""
    needed = _OPEN_SHARDS + _OTHERS
    words = f"{soft:,} open files a process"
    if soft >= needed or soft < 0:
        return Finding("limits", "ok", words)
    above = "" if hard < 0 or hard >= needed else f" (above the hard limit of {hard:,}: ask whoever runs the machine)"
    return Finding("limits", "warn", f"{words}; many shards want {needed:,}", f"ulimit -n 65536{above}")


def shared_memory(free: int, *, on_gpu: bool) -> Finding:
    """The finding on what is free in /dev/shm: NCCL takes it; batches travel without."""
    words = f"{free / 1e9:,.2f} GB free in {_SHM}"
    if free >= _SHARED or not on_gpu:
        return Finding("limits", "ok", words)
    return Finding("limits", "warn", f"{words}, which NCCL wants more of", "docker run --shm-size 8g, or an emptyDir")


def _batches(place: Place) -> Iterator[Finding]:
    recipe, ranks = place.needed, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = recipe.model.image_size
    if not recipe.data.images or size is None:
        return
    held = recipe.data.workers * recipe.data.prefetch + _HELD
    needed = ranks * held * rows_per_rank(recipe.global_batch, place.world.size) * 3 * size**2
    free = psutil.virtual_memory().available
    words = f"{needed / 1e9:,.2f} GB for batches held ready on this machine, {free / 1e9:,.1f} GB are free"
    yield Finding("limits", "fail" if needed > free else "ok", words, "fewer data.workers, or data.prefetch: 1")
