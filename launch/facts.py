"""The facts of a run for its record: where and with what it ran, and what its evaluations measure."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from data.loading.sequential import SequentialStream
from data.loading.stream import TrainStream
from vlm import __version__
from vlm.evaluation import Metric
from vlm.training.engines.base import Engine

_PACKAGES = ("torch", "open_clip_torch", "timm", "transformers", "accelerate", "deepspeed", "webdataset")


def package_versions() -> dict[str, str]:
    """Versions of this program and of the packages that its numbers depend on, as far as they are there."""
    return {"vlm": __version__, **{name: found for name in _PACKAGES if (found := _version(name)) is not None}}


def machine_facts() -> dict[str, Any]:
    """The machine of this rank: processor, cores, memory in GiB, GPU."""
    return {
        "system": platform.platform(terse=True),
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def run_facts(
    engine_name: str,
    precision: str,
    engine: Engine,
    source: TrainStream | SequentialStream,
    metrics: Mapping[str, Sequence[Metric]],
) -> dict[str, Any]:
    """The content of a run's `run.json`; `metrics` are those of each evaluation, whose meaning a report reads there."""
    numbers = {name: torch.Size(shape).numel() for name, shape in engine.shapes.items()}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "world_size": engine.world.size,
        "engine": engine_name,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "num_parameters": sum(numbers[name] for name in engine.parameters()),
        "data": [
            {"name": s.name, "shards": s.num_shards, "samples": s.num_samples, "share": s.fraction}
            for s in source.sources
        ],
        "metrics": {name: [asdict(metric) for metric in measured] for name, measured in metrics.items()},
    }


def _version(name: str) -> str | None:
    """An engine's package may be left out where another engine runs."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
