"""Roll-backs under every engine: killed after one, resumed, and compared bit for bit with the run that was left alone.

    python -P -m benchmarks.launch.roll_backs [--kinds ddp-1 ddp-2 fsdp-2 zero1-2 zero2-2 zero3-2]

Every run has a spike in its tenth step, on its last rank alone, goes back to step 4 (a checkpoint every 2 steps, at
least 5 back), and ends after step 16. Killed is every rank by SIGKILL, as soon as the roll-back is in the log. The
weights are also compared with those of a run whose steps 5 to 10 had no finite loss, which another guard leaves out.
"""

import argparse
import json
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_cache import machine
from tests.launch.lives import Life, end_all, start_ranks, wait_until
from tests.launch.tiny import assert_same_run, write_tiny, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint
from vlm.training.hooks.spikes import ROLLED_BACK

KINDS = ("ddp-1", "ddp-2", "fsdp-2", "zero1-2", "zero2-2", "zero3-2")
SPIKE, POISON = "tests.vlm.training.poison:Spike", "tests.vlm.training.poison:Poison"
GUARD = {"action": "roll_back", "figures": ["loss"], "z": 30, "window": 3, "steps_back": 5}


def recipe_of(folder: Path, name: str, kind: str, steps: list[int], guard: dict[str, Any] | None) -> tuple[str, int]:
    """A run's recipe and its number of ranks."""
    engine, _, ranks = kind.partition("-")
    term = {"weight": 1.0, "steps": steps, "rank": int(ranks) - 1}
    planted = {POISON: term} if guard is None else {SPIKE: {**term, "loss": 200.0}}
    changes: dict[str, Any] = {
        "engine": engine,
        "duration": "16 steps",
        "checkpoint_every": "2 steps",
        "max_bad_steps": 100,
        "objective": {"clip": 1.0, **planted},
        "guard": guard,
    }
    return write_tiny_recipe(folder, folder / name, **changes, data={"max_bad_share": 1}), int(ranks)


def live(folder: Path, recipe: str, ranks: int, resume: bool = False, kill: Path | None = None) -> list[int | None]:
    """The exit codes of a run's ranks, which are killed when the log of run `kill` tells of a roll-back."""
    arguments = ["train", recipe, "--trust", *(["--resume", "auto"] if resume else [])]
    lives: list[Life] = start_ranks(ranks, arguments, folder / "errors")
    try:
        if kill is not None:
            wait_until(lambda: ROLLED_BACK in read(kill / "metrics.jsonl"), 600)
            for life in lives:
                life.signal(signal.SIGKILL)
        return [life.ended(600) for life in lives]
    finally:
        end_all(lives)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def same_weights(run: Path, other: Path) -> bool:
    ends = [Checkpoint(sorted((path / "checkpoints").iterdir())[-1]) for path in (run, other)]
    return all(
        torch.equal(ends[0].tensor(group, name), ends[1].tensor(group, name))
        for group in ("weights", "exp_avg", "exp_avg_sq")
        for name in ends[0].names(group)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    kinds = parser.parse_args().kinds
    print(f"{machine()}\n\n| engine-ranks | went back | killed | resumed to the same bits | as if left out |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tiny(folder)
        for kind in kinds:
            whole, ranks = recipe_of(folder, f"{kind}-whole", kind, [9], GUARD)
            killed, _ = recipe_of(folder, f"{kind}-killed", kind, [9], GUARD)
            left_out, _ = recipe_of(folder, f"{kind}-left-out", kind, list(range(4, 10)), None)
            assert live(folder, whole, ranks) == [0] * ranks
            assert live(folder, left_out, ranks) == [0] * ranks
            codes = live(folder, killed, ranks, kill=folder / f"{kind}-killed")
            assert live(folder, killed, ranks, resume=True) == [0] * ranks
            lines = map(json.loads, read(folder / f"{kind}-whole/metrics.jsonl").splitlines())
            back = [f"{line['step']} to {line[ROLLED_BACK]}" for line in lines if ROLLED_BACK in line]
            try:
                assert_same_run(folder / f"{kind}-killed", folder / f"{kind}-whole")
                same = "yes"
            except AssertionError:
                same = "NO"
            as_left = "yes" if same_weights(folder / f"{kind}-whole", folder / f"{kind}-left-out") else "NO"
            print(f"| {kind} | {', '.join(back)} | {codes} | {same} | {as_left} |", flush=True)


if __name__ == "__main__":
    main()
