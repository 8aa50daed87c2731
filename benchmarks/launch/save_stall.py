"""Stall of training for a checkpoint of a ViT-B/32 with AdamW's moments, beside torch.save; and what writing takes.

    python -P -m benchmarks.launch.save_stall [FOLDER] [--turns 5] [--again]

The state is 1.82 GB of random numbers in the shapes of the model's weights and moments. The ways take turns on the same
state and disk; what was measured stays in FOLDER. What training stops for is all that it does not do meanwhile: the
copy, and, when all is written, the manifest, the name, and taking away the one before, as a run does that keeps one.
Steps of a matrix product go on meanwhile: their median time alone, and while a checkpoint is written and an old one
deleted, says what that takes from training.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.result_cache import ResultCache, machine
from vlm.checkpoint.deletion import Deletion
from vlm.checkpoint.folder import delete, put_away
from vlm.checkpoint.manifest import Manifest
from vlm.checkpoint.retention import Retention
from vlm.checkpoint.writer import Group, Writer
from vlm.distributed.world import World
from vlm.model.build import build_shapes
from vlm.model.config import ModelConfig

GROUPS = ("weights", "exp_avg", "exp_avg_sq")
WAYS = ("torch.save", "in the foreground", "in the background")
Seconds = dict[str, float]


def main() -> None:
    """Measure what is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/save-stall"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="drop what earlier runs measured")
    arguments = parser.parse_args()
    results = ResultCache(arguments.folder, "seconds", arguments.again)
    stall = Stall(arguments.folder / "written")
    found: dict[str, list[Seconds]] = {}
    for turn in range(arguments.turns):
        for way in WAYS:
            found.setdefault(way, []).append(results(f"{way}, turn {turn}", stall.of(way)))
    print(f"{machine()}; {stall.gigabytes:.2f} GB\n")
    print(
        "| way | training stops, s | of torch.save | of a minute | until it is complete, s | a step alone, ms | "
        "a step meanwhile, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    stops = {way: statistics.median(turn["stop"] for turn in turns) for way, turns in found.items()}
    for way, turns in found.items():
        stop, *columns = (
            _words([turn[name] for turn in turns if name in turn]) for name in ("stop", "whole", "alone", "beside")
        )
        shares = f"{stops[way] / stops[WAYS[0]]:.2f} | {stops[way] / 60:.1%}"
        print(f"| {way} | {stop} | {shares} | {' | '.join(columns)} |")
    shutil.rmtree(stall.folder, ignore_errors=True)


def _words(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


class Stall:
    """The state, which is made when it is first needed, and the ways of saving it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state: dict[str, dict[str, Tensor]] = {}
        self._writers: dict[bool, Writer] = {}
        self._deletion = Deletion(World())
        self._turn = 0

    @property
    def gigabytes(self) -> float:
        """The size of the state."""
        return sum(tensor.nbytes for group in self._made().values() for tensor in group.values()) / 1e9

    def of(self, way: str) -> Callable[[], Seconds]:
        """What measures a way once."""
        return self._torch_save if way == WAYS[0] else lambda: self._write(background=way == WAYS[2])

    def _made(self) -> dict[str, dict[str, Tensor]]:
        if not self._state:
            model = build_shapes(ModelConfig(open_clip="ViT-B-32"))[0]
            shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
            self._state = {group: {name: torch.randn(shape) for name, shape in shapes.items()} for group in GROUPS}
        return self._state

    def _torch_save(self) -> Seconds:
        state = self._made()
        self.folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        torch.save(state, self.folder / "state.pt")
        seconds = time.perf_counter() - began
        (self.folder / "state.pt").unlink()
        return {"stop": seconds, "whole": seconds}

    def _write(self, *, background: bool) -> Seconds:
        groups: dict[str, Group] = {
            group: ({name: tensor.numel() for name, tensor in tensors.items()}, tensors.__getitem__)
            for group, tensors in self._made().items()
        }
        if background not in self._writers:
            self._writers[background] = Writer(self.folder, World(), background=background)
            # The first copy makes the memory that later ones are made in, and the first checkpoint makes none old.
            self._writers[background].begin(self._manifest(), groups)
            self._writers[background].complete()
        writer, alone = self._writers[background], _step_milliseconds(20, lambda: True)
        began = time.perf_counter()
        writer.begin(self._manifest(), groups)
        stopped = time.perf_counter() - began
        beside = _step_milliseconds(10_000, lambda: not writer.is_written()) if background else None
        written = time.perf_counter()
        writer.complete()
        old = put_away(self.folder, Retention(1, 1), self._turn)
        if beside is None:
            delete(old)
            whole = time.perf_counter() - began
            return {"stop": whole, "whole": whole}
        self._deletion.begin(old)
        ended = time.perf_counter()
        self._deletion.wait()
        return {"stop": stopped + ended - written, "whole": ended - began, "alone": alone, "beside": beside}

    def _manifest(self) -> Manifest:
        self._turn += 1
        facts = {"samples": 1, "num_updates": 1, "world_size": 1, "engine": "ddp", "threads": 1}
        return Manifest(step=self._turn, model={}, data={}, versions={}, **facts)


def _step_milliseconds(most: int, goes_on: Callable[[], bool]) -> float:
    """The median time of a matrix product of 2 GFLOP, which stands for a step."""
    factor = torch.randn(1000, 1000)
    taken: list[float] = []
    while len(taken) < most and (goes_on() or not taken):
        began = time.perf_counter()
        factor @ factor
        taken.append(1_000 * (time.perf_counter() - began))
    return statistics.median(taken)


if __name__ == "__main__":
    main()
