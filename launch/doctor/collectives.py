"""What travels between the ranks: a real all-gather and reduce-scatter, compared with what has to come out."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding, State

_NUMBERS, _TIMES, _SHORT_TIMES = 2**20, 5, 50  # 4 MiB of each rank
_SLOW_GPU, _SLOW_CPU = 2.0, 0.05  # GB/s
_LATE_GPU, _LATE_CPU = 1.0, 20.0  # ms


@CHECKS.register("collectives")
class Collectives(Check):
    """Bandwidth and latency of an all-gather and a reduce-scatter, and whether they give the right sums. Collective."""

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        world = place.world
        if world.size == 1:
            words = "one rank has nobody to talk to; start this as the run will be (torchrun --no-python vlm doctor)"
            return [Finding("collectives", "ok", words)]
        return _measured(place)


def _measured(place: Place) -> Iterator[Finding]:
    world, device = place.world, place.device
    on_gpu = device.type == "cuda"
    own = torch.full((_NUMBERS,), float(world.rank + 1), device=device)
    all_rows = own.new_empty(world.size * _NUMBERS)
    part = own.new_empty(_NUMBERS)
    sent = (world.size - 1) * own.numel() * own.itemsize
    for name, send in {
        "all-gather": lambda: dist.all_gather_into_tensor(all_rows, own),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, all_rows),
    }.items():
        rate = sent / _seconds(send, _TIMES, place) / 1e9
        rates = world.gather_objects(rate)
        slow = min(rates) < (_SLOW_GPU if on_gpu else _SLOW_CPU)
        fix = "see which interface is taken (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        words = f"{name} of {world.size} ranks: each sends {min(rates):,.2f} to {max(rates):,.2f} GB/s"
        yield Finding("collectives", "warn" if slow else "ok", words, fix)
    expected = torch.arange(1, world.size + 1, device=device).float().repeat_interleave(_NUMBERS)
    right = torch.equal(all_rows, expected) and bool((part == world.size * (world.rank + 1)).all())
    if not all(world.gather_objects(right)):
        yield Finding("collectives", "fail", "sums are wrong", "another version of NCCL or of the driver")
    small = torch.ones(1, device=device)
    late = 1e3 * _seconds(lambda: dist.all_reduce(small), _SHORT_TIMES, place)
    slowest = max(world.gather_objects(late))
    state: State = "warn" if slowest > (_LATE_GPU if on_gpu else _LATE_CPU) else "ok"
    fix = "ranks that are near each other, and cores that are free"
    yield Finding("collectives", state, f"an all-reduce of one number takes {slowest:,.2f} ms", fix)


def _seconds(send: Callable[[], object], times: int, place: Place) -> float:
    send()
    place.world.barrier()
    began = time.perf_counter()
    for _ in range(times):
        send()
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return (time.perf_counter() - began) / times
