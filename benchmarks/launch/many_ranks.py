"""Time of what is asked before a run of 1,024 ranks: a plan, the order of samples, and the doctor's look at the data.

    python -P -m benchmarks.launch.many_ranks [--ranks 1024] [--shards 10000]

ViT-B/32 on a global batch of 32 pairs a rank. The shards are names in a manifest and empty files: a rank's look at the
data is what it does alone (manifests, its part of the order, the stamps of all shards), taken for each of some ranks in
turn, one process having the time of one. What ranks send to each other is not simulated.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.result_cache import machine
from data.order.order import Order, SourceCounts
from data.shards.manifest import NAME, FolderManifest, ShardEntry, manifest_bytes
from data.shards.store import stamp_once
from launch.doctor.check import Place
from launch.doctor.order import SampleOrder, first_picks
from launch.doctor.sources import Index, Sources
from launch.doctor.tokenizer import TokenizerAndModel
from launch.findings import worst
from launch.plan.duration import Machine
from launch.plan.engines import Cluster
from launch.plan.gpu import gpu_named
from launch.plan.plan import Question, make_plan
from launch.recipe import Recipe
from vlm.distributed.world import World

_SAMPLES, _GPUS, _PAIRS, _LOOKED_AT = 10_000, 8, 32, 5


def write_shards(folder: Path, count: int) -> None:
    """Files of a byte, and the manifest that says that each holds 10,000 samples."""
    entries = {}
    for number in range(count):
        path = folder / f"web-{number:05d}.tar"
        path.write_bytes(b"0")
        stamp = stamp_once(str(path), 0)
        entries[path.name] = ShardEntry(stamp.size, stamp.version, _SAMPLES, 0, _SAMPLES, 0, "0" * 32)
    (folder / NAME).write_bytes(manifest_bytes(FolderManifest(entries)))


def recipe_of(folder: Path, ranks: int, shards: int) -> Recipe:
    values: dict[str, Any] = {
        "run": str(folder / "run"),
        "model": {"open_clip": "ViT-B-32"},
        "data": {"root": str(folder), "sources": {"web": {"shards": f"web-{{00000..{shards - 1:05d}}}.tar"}}},
        "duration": "1 epoch",
        "global_batch": _PAIRS * ranks,
        "precision": "bf16",
    }
    return Recipe.model_validate(values)


class Taken(NamedTuple):
    """Seconds of one piece of work, on the wall and of the processor: others are busy here too."""

    wall: float
    cpu: float


def taken(work: Callable[[], object]) -> Taken:
    began, used = time.perf_counter(), time.process_time()
    work()
    return Taken(time.perf_counter() - began, time.process_time() - used)


def order_of_all(recipe: Recipe, ranks: int, shards: int) -> None:
    """Every rank's samples of the first batch, which are all different."""
    order = Order(recipe.seed, [SourceCounts("web", [_SAMPLES] * shards)], recipe.global_batch)
    seen = set()
    for rank in range(ranks):
        picks = order.picks(0, range(rank * _PAIRS, (rank + 1) * _PAIRS))
        seen |= set(zip(picks.shards.tolist(), picks.rows.tolist(), strict=True))
    assert len(seen) == recipe.global_batch


def look_at_data(recipe: Recipe, world: World) -> None:
    """The doctor's checks of the data, as one rank of many does them."""
    place = Place(World(), recipe)
    checks = (Sources(), Index(), TokenizerAndModel())
    assert worst(finding for check in checks for finding in check.findings(place)) == "ok"
    assert first_picks(recipe, world)[0] == _PAIRS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=10_000)
    arguments = parser.parse_args()
    ranks, shards = arguments.ranks, arguments.shards
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, shards)
        recipe = recipe_of(folder, ranks, shards)
        question = Question(Machine(gpu_named("h100"), Cluster(ranks // _GPUS, _GPUS)), engine="fsdp")
        parts = {
            "plan, all engines": taken(lambda: make_plan(recipe, "ViT-B/32", question)),
            "order of all ranks, one batch": taken(lambda: order_of_all(recipe, ranks, shards)),
        }
        looked_at = range(0, ranks, max(1, ranks // _LOOKED_AT))
        looks = [taken(lambda rank=rank: look_at_data(recipe, World(rank, ranks))) for rank in looked_at]  # type: ignore[misc]
        medians = (statistics.median(one) for one in zip(*looks, strict=True))
        parts["doctor's look at the data, a rank"] = Taken(*medians)
        assert [one.state for one in SampleOrder().findings(Place(World(), recipe))] == ["ok"]
    print(f"{machine()}; {ranks:,} ranks, {shards:,} shards of {_SAMPLES:,} samples, seconds")
    print("\n| what | wall | processor |\n|---|---|---|")
    for what, one in parts.items():
        print(f"| {what} | {one.wall:.2f} | {one.cpu:.2f} |")
    print("| all three | {:.2f} | {:.2f} |".format(*(sum(column) for column in zip(*parts.values(), strict=True))))


if __name__ == "__main__":
    main()
