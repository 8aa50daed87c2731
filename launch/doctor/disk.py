"""Room and speed of the disks that a run writes to: its checkpoints, and copies of remote shards."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding, State
from launch.plan.engines import sizes_of
from launch.recipe import Recipe
from vlm.checkpoint.retention import KeepConfig
from vlm.model.build import build_shapes
from vlm.training.optimizers.maker import moment_bytes

_WRITTEN = 2**24
_SLOW = 20.0  # MB/s
_SPARE = 1  # a checkpoint that is being written beside those that are kept


@CHECKS.register("disk")
class Disk(Check):
    """Whether the run directory and the cache can be written, how fast, and for how long there is room."""

    needs_recipe = True

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        recipe = place.needed
        if place.world.is_main:
            keep = recipe.keep_checkpoints
            kept = keep.most if isinstance(keep, KeepConfig) else keep
            needed = checkpoint_bytes(recipe) * (1 if kept is None else kept + _SPARE)
            words = "each checkpoint" if kept is None else f"{kept} checkpoints and one being written"
            yield from _room("run", Path(recipe.run), needed, f"{needed / 1e9:,.2f} GB for {words}")
        if any("://" in pattern for source in recipe.data.sources.values() for pattern in source.patterns):
            limit = recipe.data.cache.limit
            yield from _room("data.cache", recipe.data.cache.path, limit, f"data.cache.limit {limit / 1e9:,.0f} GB")


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of a checkpoint: weights, moments, and the averages."""
    model, _ = build_shapes(recipe.model)
    sizes = sizes_of(model)
    return sizes.weights + moment_bytes(recipe.optimizer, model) + sizes.trained * (recipe.ema is not None)


def _room(key: str, folder: Path, needed: int, words: str) -> Iterator[Finding]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    room = f"{key}: {free / 1e9:,.1f} GB free in {existing}, {words}"
    yield Finding("disk", "ok" if free >= needed else "fail", room, "another disk, or fewer checkpoints")
    if not os.access(existing, os.W_OK):
        yield Finding("disk", "fail", f"{key}: {existing} cannot be written to", "another folder, or its permissions")
        return
    rate = _write_rate(existing)
    state: State = "warn" if rate < _SLOW else "ok"
    yield Finding("disk", state, f"{key}: writes {rate:,.0f} MB/s", "a faster disk: every checkpoint waits for it")


def _write_rate(folder: Path) -> float:
    """MB a second of a file that is written, flushed to the disk, and gone again."""
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        file.write(os.urandom(_WRITTEN))
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN / (time.perf_counter() - began) / 1e6
