"""The order of samples at the largest scale: time and memory of any step, of a start, of a resume; and its quality.

    python -P -m benchmarks.data.order [--folder FOLDER] [--again]

Each part runs in a process of its own. Finished parts are kept in FOLDER.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.result_cache import ResultCache, machine
from data.order.order import Order, SourceCounts

SHARDS, RANKS, WORKERS, GLOBAL_BATCH = 100_000, 1_024, 8, 65_536
LATENCY, BYTES_A_SECOND = 0.02, 10e6
SHAPES = ((1, 6_000, 256), (4, 1_500, 256), (20, 1_000, 256), (100, 1_000, 256), (100_000, 10, 4_096))


def megabytes() -> float:
    """The memory that this process alone holds, in MB."""
    gc.collect()
    return float(psutil.Process().memory_full_info().uss) / 1e6


def uneven(total: int) -> np.ndarray:
    """Sample counts of the shards, from a fifteenth of the mean to nearly twice as many, that sum to about `total`."""
    mean = total / SHARDS
    low, high = max(1, round(mean / 8)), round(mean * 15 / 8)
    return np.random.default_rng(0).integers(low, high + 1, SHARDS)


def seconds(work: Any) -> float:
    """The duration of one call, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def slots_of(rank: int, order: Order) -> range:
    """A rank's slots of a global batch."""
    return range(rank * order.global_batch // RANKS, (rank + 1) * order.global_batch // RANKS)


def any_step() -> dict[str, Any]:
    """Time of the ids of one reader's next batch, and memory, for 10^9 samples."""
    counts = uneven(10**9)
    before = megabytes()
    began = time.perf_counter()
    order = Order(0, [SourceCounts("web", counts)], GLOBAL_BATCH)
    made = time.perf_counter() - began
    random = np.random.default_rng(1)
    cold, warm = [], []
    for _ in range(60):
        rank, step = int(random.integers(RANKS)), int(random.integers(10**7))
        cold.append(seconds(lambda step=step, rank=rank: order.picks(step, slots_of(rank, order))))
        warm.append(seconds(lambda step=step, rank=rank: order.picks(step + WORKERS, slots_of(rank, order))))
    return {
        "samples": int(counts.sum()),
        "made": made,
        "cold": cold[1:],
        "warm": warm[1:],
        "mb": megabytes() - before + counts.nbytes / 1e6,
        "torch": "torch" in sys.modules,
    }


def resume() -> dict[str, Any]:
    """Time from nothing to the ids of step 10^6 of a set of 10^8 samples."""
    counts = uneven(10**8)
    took = [
        seconds(
            lambda: Order(0, [SourceCounts("web", counts)], GLOBAL_BATCH).picks(10**6, range(GLOBAL_BATCH // RANKS))
        )
        for _ in range(5)
    ]
    return {"samples": int(counts.sum()), "took": took}


def epoch() -> dict[str, Any]:
    """Every rank's own view of one epoch, put together."""
    counts = np.random.default_rng(0).integers(5, 76, SHARDS)
    order = Order(0, [SourceCounts("web", counts)], GLOBAL_BATCH)
    starts, total = np.cumsum(counts) - counts, int(counts.sum())
    seen = np.zeros(total, dtype=np.uint8)
    shards_read = []
    for rank in range(RANKS):
        mine = set()
        for step in range(-(-total // GLOBAL_BATCH) + 1):
            picks = order.picks(step, slots_of(rank, order))
            now = picks.epochs == 0
            np.add.at(seen, (starts[picks.shards] + picks.rows)[now], 1)
            mine.update(picks.shards[now].tolist())
        shards_read.append(len(mine))
    return {
        "samples": total,
        "missing": int((seen == 0).sum()),
        "twice": int((seen > 1).sum()),
        "shards of a rank": statistics.mean(shards_read),
    }


def quality() -> list[dict[str, float]]:
    """The distance of one epoch from a full shuffle, for several shapes of data."""
    return [shape_quality(*shape) for shape in SHAPES]


def shape_quality(shards: int, each: int, batch: int) -> dict[str, float]:
    """Rank correlation of stored and seen order, distance of neighbours, and pairs of a batch from one shard."""
    order = Order(0, [SourceCounts("a", [each] * shards)], batch)
    steps = shards * each // batch
    picks = [order.picks(step, range(batch)) for step in range(steps)]
    seen = np.concatenate([one.shards * each + one.rows for one in picks])
    total = shards * each
    together = [np.square(np.bincount(one.shards)).sum() - batch for one in picks]
    return {
        "shards": shards,
        "each": each,
        "batch": batch,
        "correlation": float(np.corrcoef(np.argsort(np.argsort(seen)), np.arange(len(seen)))[0, 1]),
        "neighbours": float(np.abs(np.diff(seen)).mean() / (total / 3)),
        "pairs": float(np.mean(together)) / (batch * (batch - 1)),
        "pairs expected": (each - 1) / (total - 1),
    }


def write_shards(folder: Path) -> None:
    """10^5 empty files and the manifest that describes them, of a set of 10^9 samples."""
    from data.shards.manifest import NAME, TEXTS, FolderManifest, ShardEntry, manifest_bytes, texts_bytes
    from data.shards.statistics import ShardStatistics

    folder.mkdir(parents=True, exist_ok=True)
    entries, texts = {}, {}
    random = np.random.default_rng(2)
    lengths = np.arange(78)
    shares = np.exp(-(((np.maximum(lengths, 3) - 14) / 9) ** 2)) + 0.002  # captions of a web crawl, in tokens
    for number, count in enumerate(uneven(10**9).tolist()):
        file = folder / f"x-{number:05d}.tar"
        file.touch()
        tokens = tuple(random.poisson(count * shares / shares.sum()).tolist())
        texts[file.name] = ShardStatistics(samples=count, captions=count, fields={"txt": count}, tokens=tokens)
        version = f"mtime:{file.stat().st_mtime_ns}"
        entries[file.name] = ShardEntry(0, version, count, 0, count, 0, "0" * 16)
    (folder / NAME).write_bytes(manifest_bytes(FolderManifest(entries)))
    (folder / TEXTS).write_bytes(texts_bytes(texts))


def start(pattern: str) -> dict[str, Any]:
    """Time and memory from a pattern of names to the first ids, of a process that has imported everything."""
    from data.shards.cache import CacheConfig, ShardCache
    from data.shards.folder_index import FolderIndex
    from data.shards.source import open_source

    before = megabytes()
    with tempfile.TemporaryDirectory() as kept:
        index = FolderIndex(ShardCache(CacheConfig(folder=kept)), "data.sources.web.shards")
        began = time.perf_counter()
        source = open_source("web", [pattern], index)
        known = time.perf_counter()
        order = Order(0, [SourceCounts("web", source.counts)], GLOBAL_BATCH)
        order.picks(0, slots_of(0, order))
        done = time.perf_counter()
        found = {"known": known - began, "took": done - began, "mb": megabytes() - before}
    return {**found, "samples": source.num_samples, "shards": len(source.shards)}


class SlowHandler(BaseHTTPRequestHandler):
    """A store with a latency and a bandwidth."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self, body: bool) -> None:
        time.sleep(LATENCY)
        file = self.folder / self.path.lstrip("/")
        content = file.read_bytes() if file.is_file() else b""
        self.send_response(200 if file.is_file() else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(content):x}"')
        self.end_headers()
        for place in range(0, len(content) if body else 0, 1 << 16):
            self.wfile.write(content[place : place + (1 << 16)])
            time.sleep((1 << 16) / BYTES_A_SECOND)


def serve(folder: Path) -> None:
    """Serve the folder until the process is ended; says its port first."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (SlowHandler,), {"folder": folder}))
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


@contextmanager
def slow_server(folder: Path) -> Iterator[str]:
    """The URL of a slow local server of the folder."""
    command = [sys.executable, "-P", "-m", "benchmarks.data.order", "--part", "serve", "--folder", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.communicate("")


def part(name: str, folder: Path, *more: str) -> Any:
    """The result that a part prints, run in a process of its own."""
    command = [sys.executable, "-P", "-m", "benchmarks.data.order", "--part", name, "--folder", str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def starts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Three starts from local shards, and three from the slow server."""
    shards = folder / "shards"
    if not (shards / "done").exists():
        write_shards(shards)
        (shards / "done").touch()
    names = "x-{00000..99999}.tar"
    local = [part("start", folder, "--pattern", f"{shards}/{names}") for _ in range(3)]
    globbed = [part("start", folder, "--pattern", f"{shards}/x-*.tar") for _ in range(3)]
    with slow_server(shards) as url:
        remote = [part("start", folder, "--pattern", f"{url}/{names}") for _ in range(3)]
    return {"local files, {00000..99999}": local, "local files, *": globbed, "slow http server": remote}


def print_times(results: ResultCache, folder: Path) -> None:
    """The table of steps, resume and the simulated epoch."""
    step, later, all_ranks = (results(name, partial(part, name, folder)) for name in ("any_step", "resume", "epoch"))
    cold, warm = (sorted(1e3 * took for took in step[kind]) for kind in ("cold", "warm"))
    resumed = [1e3 * took for took in later["took"]]
    print(
        f"\n| {RANKS:,} ranks x {WORKERS} workers, global batch {GLOBAL_BATCH:,}, {SHARDS:,} uneven shards | measured |"
    )
    print("|---|---|")
    print(f"| {step['samples']:,} samples: making the order | {1e3 * step['made']:.1f} ms |")
    print(
        f"| a reader's ids at a random step, cold: median, most | {statistics.median(cold):.2f} ms, {cold[-1]:.2f} ms |"
    )
    print(f"| the same, its epoch known: median, most | {statistics.median(warm):.2f} ms, {warm[-1]:.2f} ms |")
    print(f"| memory of the order (torch imported: {step['torch']}) | {step['mb']:.1f} MB |")
    print(f"| {later['samples']:,} samples: from nothing to the ids at step 10^6 | {max(resumed):.1f} ms at most |")
    print(
        f"| one epoch of {all_ranks['samples']:,} samples over all ranks: lost, doubled "
        f"| {all_ranks['missing']}, {all_ranks['twice']} |"
    )
    print(f"| shards that a rank reads in it, of {SHARDS:,} | {all_ranks['shards of a rank']:.1f} |")


def print_starts(found: dict[str, list[dict[str, Any]]]) -> None:
    """The table of starts."""
    print(f"\n| start from a manifest of {SHARDS:,} shards | to the index | to the first ids | memory |")
    print("|---|---|---|---|")
    for name, runs in found.items():
        known, took, held = ([run[key] for run in runs] for key in ("known", "took", "mb"))
        print(f"| {name} | {statistics.median(known):.2f} s | {statistics.median(took):.2f} s | {max(held):.0f} MB |")
    print(
        f"\nThe server: {1e3 * LATENCY:.0f} ms before each answer, then {BYTES_A_SECOND / 1e6:.0f} MB/s. Medians of 3."
    )


def print_quality(shapes: list[dict[str, float]]) -> None:
    """The table of shuffles."""
    print(
        "\n| shards x samples, batch | rank correlation of stored and seen | standard error of a full shuffle's "
        "| distance of neighbours, of N/3 | pairs of a batch from one shard, of a full shuffle's |"
    )
    print("|---|---|---|---|---|")
    for one in shapes:
        error = 1 / np.sqrt(one["shards"] * one["each"])
        pairs = one["pairs"] / one["pairs expected"]
        print(
            f"| {one['shards']:,.0f} x {one['each']:,.0f}, {one['batch']:,.0f} | {one['correlation']:+.4f} "
            f"| {error:.4f} | {one['neighbours']:.3f} | {pairs:.2f} |"
        )


PARTS = {"any_step": any_step, "resume": resume, "epoch": epoch, "quality": quality}


def main() -> None:
    """Print the tables, or do one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vlm-benchmark-order")
    parser.add_argument("--again", action="store_true", help="measure everything again")
    parser.add_argument("--part", choices=[*PARTS, "start", "serve"], help=argparse.SUPPRESS)
    parser.add_argument("--pattern", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    if arguments.part == "serve":
        serve(folder)
    elif arguments.part:
        print(json.dumps(start(arguments.pattern) if arguments.part == "start" else PARTS[arguments.part]()))
    else:
        results = ResultCache(folder, "order", arguments.again)
        print(machine())
        print_times(results, folder)
        print_starts(results("starts", lambda: starts(folder)))
        print_quality(results("quality", lambda: part("quality", folder)))


if __name__ == "__main__":
    main()
