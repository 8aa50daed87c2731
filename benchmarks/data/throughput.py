"""Speed of the training stream beside open_clip's own pipeline, cost of its stages, and memory of a worker.

    python -P -m benchmarks.data.throughput [--data DATA] [--folder FOLDER] [--peer-path PATH]

Both systems read the same shards on the same core and take turns: training crops at 224 pixels, captions as token ids,
batches ready for a model (open_clip's normalised floats, ours bytes that the model's device normalises). open_clip's
training code needs webdataset 0.2: without `--peer-path`, pip installs that into FOLDER. Finished measurements are kept
in FOLDER, so a script that was stopped goes on; `--again` drops them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.data.photographs import SETS, ShardSet, write_sets
from benchmarks.processes import Measurer
from benchmarks.result_cache import ResultCache, machine

SIZE = 224
BATCH = {"small": 256, "large": 64}
OURS, PEER = "vlm", "open_clip"
TRANSFER = "transfer to the training process"
BATCHES = {("small", OURS): 8, ("small", PEER): 3, ("large", OURS): 8, ("large", PEER): 3}
EPOCHS, PICTURES = 6, 100


def peer_path(folder: Path) -> Path:
    """A folder to import webdataset 0.2 from."""
    target = folder / "webdataset-0.2"
    if not target.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        subprocess.run([*command, "webdataset==0.2.86"], check=True)
    return target


Times = dict[str, float]


def per_sample(
    measurer: Measurer, system: str, shards: ShardSet, folder: Path, workers: int, cores: list[int]
) -> dict[str, float]:
    """Seconds a sample, `wall` and `cpu`."""
    batch, batches = BATCH[shards.name], BATCHES[shards.name, system] * len(cores)
    asked = {"folder": str(folder), "size": SIZE, "batch": batch, "batches": batches, "workers": workers}
    seconds: Times = measurer.ask(cores, what="throughput", **asked)
    return {clock: value / (batch * batches) for clock, value in seconds.items()}


def in_turn(ways: dict[str, Callable[[], Times]], repeats: int) -> dict[str, list[Times]]:
    """The results of each way, which take turns, `repeats` times over."""
    found: dict[str, list[Times]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    return found


def rates(times: list[Times]) -> list[float]:
    """Samples a second."""
    return [1 / one["wall"] for one in times]


def spread(values: list[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def print_rates(results: dict[tuple[str, int], dict[str, list[Times]]], shown: dict[str, ShardSet]) -> None:
    """The table of both systems on one core."""
    print(
        "\n| JPEG files | workers | open_clip, samples/s | vlm, samples/s | ratio of medians (of pairs in turn) ",
        end="",
    )
    print("| CPU time a sample, open_clip and vlm | ratio |")
    print("|---|---|---|---|---|---|---|")
    for (name, workers), found in results.items():
        theirs, ours = rates(found[PEER]), rates(found[OURS])
        pairs = [ours_one / theirs_one for ours_one, theirs_one in zip(ours, theirs, strict=True)]
        ratio = statistics.median(ours) / statistics.median(theirs)
        used = [1e6 * statistics.median(one["cpu"] for one in found[system]) for system in (PEER, OURS)]
        cells = [shown[name].title, str(workers), spread(theirs), spread(ours)]
        cells += [f"**{ratio:.2f}** ({min(pairs):.2f} to {max(pairs):.2f})"]
        cells += [f"{used[0]:,.0f} us, {used[1]:,.0f} us", f"{used[0] / used[1]:.2f}"]
        print("| " + " | ".join(cells) + " |")


def print_quality(results: dict[str, dict[str, list[float]]]) -> None:
    """The table of pixels."""
    print("\n| JPEG files | pictures | PSNR against open_clip's pixels of the same box: mean | least |")
    print("|---|---|---|---|")
    for found in results.values():
        for size, (mean, least, count) in sorted(found.items()):
            print(f"| {size} | {count} | {mean:.1f} dB | {least:.1f} dB |")


def print_stages(title: str, stages: dict[str, list[float]], whole: dict[int, float]) -> None:
    """The table of one set's stages, and how near the whole comes to their sum; `whole` in samples/s by workers."""
    print(f"\n| {title}: stage | alone, us a sample | limit: the library's call, the plain read |")
    print("|---|---|---|")
    for name, (alone, limit) in stages.items():
        print(f"| {name} | {alone:.1f} | {limit:.1f} |")
    sums = [sum(times[way] for times in stages.values()) for way in (0, 1)]
    print(f"| sum | {sums[0]:.0f} | {sums[1]:.0f} ({1e6 / sums[1]:,.0f} samples/s) |")
    for workers, samples in whole.items():
        limit = sums[1] if workers else sums[1] - stages[TRANSFER][1]
        print(f"| the whole, {workers} workers | {1e6 / samples:.0f} | {samples * limit / 1e6:.0%} of the limit |")


def print_workers(found: dict[str, list[Times]]) -> None:
    """The table of one worker against two."""
    singly, doubly = (rates(times) for times in found.values())
    one, two = statistics.median(singly), statistics.median(doubly)
    print("\n| workers on two cores | samples/s | against one |")
    print("|---|---|---|")
    print(f"| 1 | {spread(singly)} | 1 |\n| 2 | {spread(doubly)} | **{two / one:.2f}** |")


def print_memory(held: list[dict[str, float]]) -> None:
    """The table of a worker's memory."""
    print("\n| epoch | worker's own memory (USS), MB | with its share of shared pages (PSS), MB |")
    print("|---|---|---|")
    for number, one in enumerate(held, 1):
        print(f"| {number} | {one['uss']:.1f} | {one['pss']:.1f} |")


def measure(folder: Path, data: Path | None, peer: Path, repeats: int, results: ResultCache) -> None:
    """Measure and print everything."""
    folders = write_sets(folder, data)
    shown = {shards.name: shards for shards in SETS}
    cores = sorted(os.sched_getaffinity(0))
    found: dict[tuple[str, int], dict[str, list[Times]]] = {}
    with Measurer("benchmarks.data.ours") as ours, Measurer("benchmarks.data.peer", peer) as theirs:

        def way(measurer: Measurer, system: str, name: str, workers: int, on: list[int]) -> Callable[[], Times]:
            return lambda: per_sample(measurer, system, shown[name], folders[name], workers, on)

        for name in shown:
            for workers in (0, 1):
                both = {
                    PEER: way(theirs, PEER, name, workers, cores[:1]),
                    OURS: way(ours, OURS, name, workers, cores[:1]),
                }
                found[name, workers] = results(f"rates {name} {workers}", partial(in_turn, both, repeats))
        print_rates(found, shown)

        def ask(what: str, name: str, **more: int) -> Any:
            asked = {"what": what, "folder": str(folders[name]), "size": SIZE, **more}
            return results(f"{what} {name}", lambda: ours.ask(cores[:1], **asked))

        print_quality({name: ask("quality", name, count=PICTURES) for name in shown})
        for name in shown:
            whole = {workers: statistics.median(rates(found[name, workers][OURS])) for workers in (0, 1)}
            print_stages(shown[name].title, ask("stages", name, batch=BATCH[name], repeats=9), whole)
        if len(cores) > 1:
            numbers = {str(n): way(ours, OURS, "small", n, cores[:2]) for n in (1, 2)}
            print_workers(results("workers", lambda: in_turn(numbers, repeats)))
        print_memory(ask("memory", "small", batch=64, epochs=EPOCHS))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with tar shards of photographs; without it, made-up ones")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vlm-benchmark")
    parser.add_argument("--peer-path", type=Path, help="folder to import webdataset 0.2 from")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measure everything again")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    print(machine())
    measure(
        folder,
        arguments.data,
        arguments.peer_path or peer_path(folder),
        arguments.repeats,
        ResultCache(folder, "data", arguments.again),
    )


if __name__ == "__main__":
    main()
