"""Whole training beside open_clip's: its script against `vlm train`, from the same shards.

    python -P -m benchmarks.step.end_to_end SHARDS [--work WORK] [--turns 3] [--steps 24] [--batch 256] [--again]

Both train the small model of `against_open_clip` on the images and first captions of SHARDS (webdataset), one rank,
with two loading workers, in the precision that this machine is faster in. A turn is a fresh process of each, another
one first each time; counted are the steps from the fourth on, from the end of one update to the end of the last: data,
forward, loss, backward, clipping, update and what either writes meanwhile. The time to the first update stands beside.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.processes import apart
from benchmarks.result_cache import ResultCache, machine
from benchmarks.step.systems import MODELS, SMALL
from vlm.training.precision import faster_precision

PEER, OWN = "open_clip_train.main", "vlm train"
_SKIPPED = 3  # steps


def with_captions(shards: str, folder: Path) -> tuple[list[str], int]:
    """Copies of shards with each sample's first caption in `txt`, made where they are missing; and the samples."""
    folder.mkdir(parents=True, exist_ok=True)
    made, samples = [], 0
    for number, name in enumerate(sorted(glob(shards))):
        copy = folder / f"captioned-{number:06}.tar"
        with tarfile.open(name) as stored:
            members = [member for member in stored if member.name.endswith((".jpg", ".json"))]
            if not copy.exists():
                _copy(stored, members, copy)
        samples += sum(member.name.endswith(".jpg") for member in members)
        made.append(str(copy))
    return made, samples


def _copy(stored: tarfile.TarFile, members: Sequence[tarfile.TarInfo], copy: Path) -> None:
    aside = copy.with_suffix(".part")
    with tarfile.open(aside, "w") as out:
        for member in members:
            content = stored.extractfile(member)
            assert content is not None
            raw = content.read()
            if member.name.endswith(".json"):
                raw = json.loads(raw)["captions"][0].encode()
                member.name, member.size = member.name.replace(".json", ".txt"), len(raw)
            out.addfile(member, io.BytesIO(raw))
    aside.rename(copy)


def measure(asked: dict[str, Any]) -> dict[str, float]:
    """Samples a second of one system's steps, and the seconds from the start of the process to its first update."""
    ends: list[float] = []

    def note(*_: Any) -> None:
        ends.append(time.time())

    register_optimizer_step_post_hook(note)
    began = float(os.environ["BENCHMARK_BEGAN"])
    run: Callable[[dict[str, Any]], None] = {PEER: _peer, OWN: _own}[asked["system"]]
    run(asked)
    counted = len(ends) - _SKIPPED
    return {
        "rate": counted * asked["batch"] / (ends[-1] - ends[_SKIPPED - 1]),
        "first": ends[0] - began,
        "steps": len(ends),
    }


def _peer(asked: dict[str, Any]) -> None:
    import open_clip
    from open_clip_train.main import main

    config = Path(asked["work"]) / "small.json"
    config.write_text(json.dumps(SMALL))
    open_clip.add_model_config(config)
    last = len(asked["shards"]) - 1
    pattern = asked["shards"][0].replace("-000000", f"-{{000000..{last:06}}}")
    precision = {"bf16": "amp_bf16", "fp32": "fp32"}[asked["precision"]]
    words = f"--model small --dataset-type webdataset --train-data {pattern} --epochs 1 --workers 2 --seed 0"
    sizes = f"--train-num-samples {asked['steps'] * asked['batch']} --batch-size {asked['batch']} --warmup 100"
    rates = f"--lr 1e-3 --wd 0.2 --beta1 0.9 --beta2 0.98 --eps 1e-6 --grad-clip-norm 1.0 --precision {precision}"
    place = f"--logs {asked['work']}/open_clip-logs --name run-{time.time_ns()} --log-every-n-steps 10 --device cpu"
    main(" ".join((words, sizes, rates, place)).split())


def _own(asked: dict[str, Any]) -> None:
    from launch.recipe import check_recipe
    from launch.train import train

    recipe = {
        "run": f"{asked['work']}/vlm-runs/run-{time.time_ns()}",
        "model": {"architecture": SMALL},
        "data": {"sources": {"pairs": {"shards": asked["shards"]}}, "workers": 2, "augment": {"crop_scale": [0.9, 1]}},
        "duration": f"{asked['steps']} steps",
        "global_batch": asked["batch"],
        "precision": asked["precision"],
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup": "100 steps"},
        "trackers": [],
    }
    train(check_recipe(recipe, "the benchmark"))


def fresh(asked: dict[str, Any]) -> dict[str, float]:
    """The figures of a process that begins now."""
    os.environ["BENCHMARK_BEGAN"] = str(time.time())
    found: dict[str, float] = apart("benchmarks.step.end_to_end", "one", asked)
    return found


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/end-to-end"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=MODELS["small"][1])
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured")
    parser.add_argument("--ask", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        print(json.dumps(measure(arguments.ask[1])))
        return
    if arguments.shards is None:
        parser.error("SHARDS are needed")
    work = arguments.work.resolve()
    shards, samples = with_captions(arguments.shards, work / "shards")
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = ResultCache(work, "end-to-end", arguments.again)
    asked = {"shards": shards, "work": str(work), "steps": arguments.steps, "batch": arguments.batch}
    asked |= {"precision": faster_precision()}
    found: dict[str, list[dict[str, float]]] = {PEER: [], OWN: []}
    for turn in range(arguments.turns):
        for system in (PEER, OWN) if turn % 2 == 0 else (OWN, PEER):
            name = f"{system}, turn {turn}, {arguments.steps} steps of {arguments.batch}"
            found[system].append(results(name, partial(fresh, {**asked, "system": system})))
    print(machine(), f"\n\n{MODELS['small'][0]}, {asked['precision']}, {samples:,} samples in {len(shards)} shards\n")
    print("| training | samples/s, median (least to most) | first update after, s |\n|---|---|---|")
    for system, runs in found.items():
        cells = [_spread([run[figure] for run in runs]) for figure in ("rate", "first")]
        print(f"| {system} | {' | '.join(cells)} |")
    ratio = statistics.median(run["rate"] for run in found[OWN]) / statistics.median(run["rate"] for run in found[PEER])
    print(f"\nvlm train / open_clip: {ratio:.2f}")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
