"""Time, memory and precision of the pairwise losses beside open_clip's, in one interleaved run.

    python -P -m benchmarks.loss.comparison [--work WORK] [--turns 3] [--again]

Time is that of forward and backward on all cores; the ways take turns in one process, and the median is taken. Memory
is what a fresh process's peak rises above what it had before the loss (inputs in place), gradients included. Finished
measurements are kept in WORK.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import logsigmoid

from benchmarks.loss.tables import memory_table, precision_table, time_table, variants_table
from benchmarks.loss.ways import Leaves, Way, leaves, ways
from benchmarks.processes import peak_above
from benchmarks.result_cache import ResultCache, arguments_of_turns, machine
from vlm.distributed.world import World

ROWS = 16_384
SCALES = (14.3, 100.0)
PRODUCTS = ("fp32", "bf16")
SIZES = (4_096, 8_192, 16_384, 32_768, 65_536)


def seconds(way: Way, rows: Leaves, world: World) -> float:
    """One forward and backward."""
    for leaf in rows.values():
        leaf.grad = None
    began = time.perf_counter()
    way(rows, world).backward()
    return time.perf_counter() - began


def turns(names: list[str], num_rows: int, scale: float, bias: float, num_turns: int, world: World) -> dict[str, Any]:
    """The times of each way, turn by turn, after a small warm-up."""
    chosen = {name: way for name, way in ways(world).items() if name in names}
    small, rows = (leaves(count, scale, bias, world) for count in (256, num_rows))
    for way in chosen.values():
        seconds(way, small, world)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(num_turns):
        for name in names:
            if world.size > 1:
                dist.barrier()
            times[name].append(seconds(chosen[name], rows, world))
    return times


def peak(name: str, num_rows: int, scale: float, world: World) -> float:
    """By how many MB a way raises this process's peak above what its inputs need."""
    way = ways(world)[name]
    rows = leaves(num_rows, scale, -10.0, world)
    seconds(way, leaves(256, scale, -10.0, world), world)  # libraries, threads and their buffers
    return peak_above(lambda: seconds(way, rows, world))


def errors(name: str, scale: float, kind: str) -> dict[str, float]:
    """Relative errors of value and gradients at 2,048 rows against float64."""
    world, count = World(), 2_048
    rows = leaves(count, scale, -10.0, world, kind)
    seconds(ways(world)[name], rows, world)
    value = float(ways(world)[name](rows, world).detach())
    exact = {key: leaf.detach().double().requires_grad_() for key, leaf in rows.items()}
    logits = exact["scale"] * exact["image"] @ exact["text"].T
    positive = logits.diagonal()
    # The positive stays out of the sum that it is compared with, or float64 too loses all to 1 - 1 where pairs align.
    others = logits.masked_fill(torch.eye(count, dtype=torch.bool), float("-inf"))
    wanted = -(logsigmoid(positive - others.logsumexp(1)) + logsigmoid(positive - others.logsumexp(0))).mean() / 2
    wanted.backward()
    found = {"value": abs(value - wanted.item()) / wanted.item()}
    for key in ("image", "text", "scale"):
        one, other = rows[key].grad, exact[key].grad
        assert one is not None
        assert other is not None
        found[key] = float((one.double() - other).norm() / other.norm())
    return found


def apart(part: str, world_size: int = 1, **arguments: Any) -> list[Any]:
    """The answers of the ranks' fresh processes."""
    port = torch.randint(20_000, 50_000, ()).item()
    asked = json.dumps({"part": part, "size": world_size, "port": port, **arguments})
    command = [sys.executable, "-P", "-m", "benchmarks.loss.comparison", "--ask"]
    started = [
        subprocess.Popen([*command, json.dumps({"rank": rank, **json.loads(asked)})], stdout=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    return [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in started]


def answer(asked: dict[str, Any]) -> None:
    """The work of one fresh process."""
    part, size, port, rank = (asked.pop(key) for key in ("part", "size", "port", "rank"))
    if size > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    world = World.current()
    functions: dict[str, Callable[..., Any]] = {"turns": turns, "peak": peak}
    print(json.dumps(functions[part](**asked, world=world)))
    if size > 1:
        dist.destroy_process_group()


def timed(names: Sequence[str], scale: float, num_turns: int) -> dict[str, Any]:
    """Arguments of `turns` for these ways on 16k pairs."""
    return {"names": names, "num_rows": ROWS, "scale": scale, "bias": -10.0, "num_turns": num_turns}


def measure_times(results: ResultCache, num_turns: int) -> str:
    """One process: ours and the peer's, at two scales and precisions."""
    lines = []
    for product in PRODUCTS:
        for scale in SCALES:
            names = [f"clip {product}", f"open_clip ClipLoss {product}"]
            what = timed(names, scale, num_turns)
            (times,) = results(f"time {product} {scale}", partial(apart, "turns", **what))
            lines.append((f"CLIP, scale {scale:g}, {product}", *names, times))
        names = [f"sigmoid {product}", f"open_clip SigLipLoss {product}"]
        what = timed(names, 10.0, num_turns)
        (times,) = results(f"time sigmoid {product}", partial(apart, "turns", **what))
        lines.append((f"sigmoid, {product}", *names, times))
    return time_table(lines)


def measure_variants(results: ResultCache, num_turns: int) -> str:
    """The table of the cost of per-entry and per-row options beside the plain loss."""
    rows = {}
    for product in PRODUCTS:
        names = [name for name in ways(World()) if name.endswith(product) and "open_clip" not in name]
        names = [name for name in names if "ring" not in name]
        what = timed(names, 14.3, num_turns)
        (rows[product],) = results(f"variants {product}", partial(apart, "turns", **what))
    return variants_table(rows)


def measure_memory(results: ResultCache) -> str:
    """Peak memory from 4k to 64k pairs; the peer's up to 16k."""
    rows: dict[str, dict[int, float]] = {}
    for name in ("clip fp32", "clip bf16", "sigmoid fp32", "open_clip ClipLoss fp32", "open_clip ClipLoss bf16"):
        for size in SIZES:
            if "open_clip" in name and size > ROWS:
                continue
            what: dict[str, Any] = {"name": name, "num_rows": size, "scale": 14.3}
            (rows.setdefault(name, {})[size],) = results(f"memory {name} {size}", partial(apart, "peak", **what))
    return memory_table(rows, SIZES)


def measure_ranks(results: ResultCache, num_turns: int) -> str:
    """Two ranks of 8k pairs: time and each rank's memory."""
    names = [f"{way} {product}" for product in PRODUCTS for way in ("clip", "clip ring", "open_clip ClipLoss")]
    what = {**timed(names, 14.3, num_turns), "num_rows": ROWS // 2}
    times = results("two ranks", lambda: apart("turns", 2, **what))[0]
    lines = ["| two ranks x 8,192 pairs | seconds, median (least to most) | MB a rank |", "|---|---|---|"]
    for name in names:
        memory: dict[str, Any] = {"name": name, "num_rows": ROWS // 2, "scale": 14.3}
        peaks = results(f"two ranks memory {name}", partial(apart, "peak", 2, **memory))
        found = times[name]
        spread = f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        lines.append(f"| {name} | {spread} | {max(peaks):.0f} |")
    return "\n".join(lines)


def measure_precision(results: ResultCache) -> str:
    """Against a dense loss in float64."""
    rows = {}
    for product in PRODUCTS:
        for kind, scale in (("random", 14.3), ("random", 100.0), ("aligned", 14.3), ("aligned", 100.0)):
            for name in (f"clip {product}", f"open_clip ClipLoss {product}"):
                rows[name, kind, scale] = results(f"error {name} {kind} {scale}", partial(errors, name, scale, kind))
    return precision_table(rows)


def main() -> None:
    """Measure what is missing, then print the tables."""
    arguments = arguments_of_turns(__doc__)
    if arguments.ask:
        answer(arguments.ask)
        return
    results = ResultCache(arguments.work, "loss", arguments.again)
    print(machine(), "\n")
    for table in (
        measure_times(results, arguments.turns),
        measure_variants(results, arguments.turns),
        measure_memory(results),
        measure_ranks(results, arguments.turns),
        measure_precision(results),
    ):
        print(table, "\n", flush=True)


if __name__ == "__main__":
    main()
