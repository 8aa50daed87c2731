"""What a second rank costs: a step of one rank with two threads and of two with one thread each, beside open_clip's.

    python -P -m benchmarks.launch.overhead [--turns 4] [--captions 'SHARDS']

The 22 M model of `benchmarks.step`, a global batch of 256 in bf16; captions are those of `SHARDS`, or as the web's.
The ranks are those of torchrun, afresh in each turn; the four ways follow each other. A step's time is rank 0's, which
waits for the other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import islice

import torch
import torch.distributed as dist

from benchmarks.result_cache import machine
from benchmarks.step.systems import Own, Peer, batches

NAME, WARM, STEPS = "small", 2, 6
SYSTEMS = ("open_clip", "vlm")


def measure(system: str, ranks: int, captions: str | None) -> float:
    """The median of a few steps, after some that are not counted."""
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    own = ["-m", "benchmarks.launch.overhead", "--rank-of", system, *(["--captions", captions] if captions else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks)}
    done = subprocess.run([*torchrun, *own], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(times)


def work(system: str, captions: str | None) -> None:
    """What each rank does."""
    if system == "open_clip" and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    step = Peer(NAME) if system == "open_clip" else Own(NAME, {})
    times = [step(batch) for batch in islice(batches(NAME, captions), WARM + STEPS)][WARM:]
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(times))
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--captions", help="shards whose captions are taken")
    parser.add_argument("--rank-of", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        work(arguments.rank_of, arguments.captions)
        return
    times: dict[tuple[str, int], list[float]] = {(system, ranks): [] for system in SYSTEMS for ranks in (1, 2)}
    for _ in range(arguments.turns):
        for (system, ranks), found in times.items():
            found.append(measure(system, ranks, arguments.captions))
    print(f"{machine()}, torch {torch.__version__}\n")
    print("| system | s, 1 rank of 2 threads | s, 2 ranks of 1 thread | 2 ranks / 1 rank |\n|---|---|---|---|")
    for system in SYSTEMS:
        one, two = (times[system, ranks] for ranks in (1, 2))
        cells = [f"{statistics.median(of):.3f} ({min(of):.3f} to {max(of):.3f})" for of in (one, two)]
        print(f"| {system} | {' | '.join(cells)} | {statistics.median(two) / statistics.median(one):.3f} |")


if __name__ == "__main__":
    main()
