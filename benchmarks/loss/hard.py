"""Cost of the hard contrastive loss beside `clip`: forward and backward, by dimension and share of negatives.

    python -P -m benchmarks.loss.hard [--turns 5]

Both take turns in one process on one thread; the table gives the least processor time of each and their ratio.
"""

import argparse
import time

import torch

from benchmarks.loss.ways import Leaves, Way, leaves, term
from benchmarks.result_cache import machine
from vlm.distributed.world import World

ROWS = 4096
SHARES = (0.1, 0.5, 0.9)


def seconds(way: Way, rows: Leaves, world: World) -> float:
    """Processor time of one forward and backward."""
    for leaf in rows.values():
        leaf.grad = None
    began = time.process_time()
    way(rows, world).backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    world = World()
    ways = {"clip": term({"clip": 1.0})} | {f"hard {share}": term({"hard": {"hardest": share}}) for share in SHARES}
    print(f"{machine()}; {ROWS:,} pairs, fp32, one thread")
    for dim in (32, 128, 512):
        rows = leaves(ROWS, 14.3, -10.0, world, dim=dim)
        least = {name: min(seconds(way, rows, world) for _ in range(turns)) for name, way in ways.items()}
        told = (f"{name} {best:.3f} s ({best / least['clip']:.1f}x)" for name, best in least.items())
        print(f"dim {dim:4}: {', '.join(told)}")


if __name__ == "__main__":
    main()
