"""The device that all was measured on, and the peak of its products."""

import platform
import statistics
import time
from typing import Any

import torch

from benchmarks.gpu.setting import Setting
from launch.plan.gpu import TERA, shipped_gpus

_ROWS = 8192


def describe(device: str, quick: bool) -> dict[str, Any]:
    """Names and versions, and the peak of bf16 products in FLOPs a second: as published, or else measured."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device != "cuda":
        return {**facts, "name": platform.processor() or platform.machine(), "peak": None, "peak_is": "unknown"}
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU (--device cpu --quick tries all without one)")
    properties = torch.cuda.get_device_properties(0)
    peak = _published(properties.name, properties.total_memory)
    return {
        **facts,
        "name": properties.name,
        "gigabytes": properties.total_memory / 1e9,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "bf16": torch.cuda.is_bf16_supported(),
        "peak": peak or _measured(Setting(device, quick)),
        "peak_is": "published" if peak else "of a product measured here",
    }


def _published(name: str, memory: int) -> float | None:
    """That of the shipped table whose name is in the device's; of several, the one whose memory is nearest."""
    words = name.lower().replace("-", " ").split()
    known = {key: gpu for key, gpu in shipped_gpus().items() if _is_named(key, words)}
    if not known:
        return None
    nearest = min(known.values(), key=lambda gpu: abs(gpu.memory_gb * 1e9 - memory))
    return nearest.bf16_tflops * TERA


def _is_named(key: str, words: list[str]) -> bool:
    """`a100-80` is in NVIDIA A100-SXM4-80GB, `rtx-4090` in NVIDIA GeForce RTX 4090; sizes are told by memory."""
    return all(part in words for part in key.split("-") if part not in ("40", "80"))


def _measured(setting: Setting) -> float:
    rows = setting.choose(_ROWS, 256)
    a = torch.randn(rows, rows, device=setting.place, dtype=torch.bfloat16)
    times = []
    for _ in range(8):
        setting.wait()
        began = time.perf_counter()
        torch.mm(a, a)
        setting.wait()
        times.append(time.perf_counter() - began)
    return 2 * rows**3 / statistics.median(times[2:])
