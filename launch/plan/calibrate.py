"""`vlm plan --calibrate`: this machine's figures, measured in half a minute, as a file that a plan reads (--gpu)."""

import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from torch.multiprocessing.spawn import spawn

from data.images.augment import AugmentConfig
from data.images.views import training_view
from launch.plan.gpu import GIGA, MICRO, TERA, Gpu
from vlm.model.image_spec import ImageSpec
from vlm.paths import output_file, write_output
from vlm.training.precision import Precision

_SECONDS = 2.0  # for each figure
_ROWS, _WIDTH, _WIDER = 1024, 768, 3072
_ON_GPU = 8  # times as many rows
_LARGE, _SENT = 2**26, 2**24  # numbers that are added, and sent
_PHOTOGRAPH, _VIEW = (500, 375), 224


def write_calibration(out: Path) -> None:
    """Measure this machine and write its figures to a file for --gpu. Raises UserError where it cannot be written."""
    target = output_file(out, "--out")
    figures = calibrated().model_dump(mode="json", exclude_none=True)
    head = f"# Measured on {platform.node()} by `vlm plan --calibrate` at {time.strftime('%Y-%m-%d %H:%M')}\n"
    write_output(target, head + yaml.safe_dump(figures, sort_keys=False), "--out")
    print(head + "".join(f"{name}: {value}\n" for name, value in figures.items()), end="")
    print(f"written: {target}")


def calibrated() -> Gpu:
    """The figures of this machine: of its first GPU, or of one rank on its CPU with the threads that torch has now.

    Links are measured between two processes here. What is not (other nodes) is taken to be as fast.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    link, latency = _link()
    return Gpu(
        name=torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        kind="gpu" if on_gpu else "cpu",
        memory_gb=round(memory / GIGA, 2),
        reserved_gb=1.5 if on_gpu else 1.0,
        bf16_tflops=_product_rate(device, "bf16") / TERA,
        fp32_tflops=_product_rate(device, "fp32") / TERA,
        matrix_share=1.0,
        memory_gb_s=_memory_rate(device) / GIGA,
        memory_share=1.0,
        op_us=_start_of_operation(device) / MICRO,
        link_gb_s=link / GIGA,
        network_gb_s=link / GIGA,
        link_share=1.0,
        latency_us=latency / MICRO,
        overlap=0.8 if on_gpu else 0.0,
        cores=max(1, len(psutil.Process().cpu_affinity() or [1]) / (torch.cuda.device_count() if on_gpu else 1)),
        decode_ms=_decode_seconds() * 1e3,
        note="measured; links by gloo on this machine" if not on_gpu else "measured; links are of gloo: write your own",
    )


def _timed(work: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of one call, the median of those that fit into the time."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _product_rate(device: torch.device, precision: Precision) -> float:
    """FLOPs a second of a layer of a transformer, as the towers have it."""
    rows = _ROWS * (_ON_GPU if device.type == "cuda" else 1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = torch.randn(rows, _WIDTH), torch.randn(_WIDER, _WIDTH)
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    return 2 * rows * _WIDTH * _WIDER / _timed(lambda: torch.nn.functional.linear(x, weight), device)


def _memory_rate(device: torch.device) -> float:
    """Bytes a second of an operation that makes new memory, as those of a step do."""
    a = torch.ones(_LARGE // 8, device=device)
    return 3 * a.numel() * a.itemsize / _timed(lambda: a + a, device)


def _start_of_operation(device: torch.device) -> float:
    """Seconds of an operation on next to nothing, with a graph, forward and backward."""
    a = torch.ones(8, device=device, requires_grad=True)

    def chain() -> None:
        b = a
        for _ in range(50):
            b = b * 2
        b.sum().backward()

    return _timed(chain, device) / 100


def _decode_seconds() -> float:
    """Seconds of one thread from a JPEG of a usual size to a training view."""
    width, height = _PHOTOGRAPH
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    stored = io.BytesIO()
    Image.fromarray(noise).resize(_PHOTOGRAPH, Image.Resampling.BICUBIC).save(stored, "JPEG", quality=90)
    spec, out = ImageSpec(size=_VIEW), np.empty((3, _VIEW, _VIEW), np.uint8)
    return _timed(lambda: training_view(stored.getvalue(), spec, AugmentConfig(), ("calibration",), out))


def _link() -> tuple[float, float]:
    """Bytes a second that one of two processes sends in an all-gather by gloo, and seconds of a hop."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure_link, args=(folder,), nprocs=2)
        rate, latency = (float(word) for word in (Path(folder) / "figures").read_text().split())
    return rate, latency


def _measure_link(rank: int, folder: str) -> None:
    store = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    sent, small = torch.ones(_SENT // 4), torch.ones(1)
    received = torch.empty(2 * len(sent))
    counts = {"large": 12, "small": 200}  # as many on both ranks
    times: dict[str, float] = {}
    for name, count in counts.items():
        dist.barrier()
        began = time.perf_counter()
        for _ in range(count):
            if name == "large":
                dist.all_gather_into_tensor(received, sent)
            else:
                dist.all_reduce(small)
        times[name] = (time.perf_counter() - began) / count
    if rank == 0:
        (Path(folder) / "figures").write_text(f"{sent.numel() * sent.itemsize / times['large']} {times['small']}")
    dist.destroy_process_group()
