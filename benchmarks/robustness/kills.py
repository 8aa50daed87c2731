"""Runs killed, stopped and interrupted at random and chosen moments, then resumed to the bits of one left alone.

    python -P -m benchmarks.robustness.kills [FOLDER] [--runs 6] [--kills 10] [--again]

Every run is ended `--kills` times by SIGKILL, SIGTERM or SIGINT and then lives to its end: samples, skips, metrics,
weights, moments and averages must be those of the run that was left alone. Finished runs stay in FOLDER.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.result_cache import ResultCache, machine
from tests.data.small_shards import sample, write_shard
from tests.launch.lives import Life, end_all, num_lines, start_command, wait_until
from tests.launch.tiny import assert_same_run, write_tiny, write_tiny_recipe

STEPS = 150
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXPECTED = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
# Where a chosen moment is: a function, at whose beginning the signal comes.
MOMENTS = {
    "directory made": ("vlm.training.run_directory", "write_text"),
    "index": ("data.shards.folder_index", "write_bytes"),
    "save": ("vlm.checkpoint.writer", "save_hashed"),
    "rename": ("vlm.checkpoint.writer", "_complete"),
    "prune": ("vlm.training.hooks.checkpoints", "put_away"),
    "deletion": ("vlm.checkpoint.deletion", "delete"),
    "evaluation": ("eval.encoder", "embed_local_texts"),
    "report": ("eval.report", "write_report"),
}


def main() -> None:
    """Run what is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/kills"))
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--kills", type=int, default=10, help="of each run")
    parser.add_argument("--again", action="store_true", help="drop the runs of earlier starts")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    results = ResultCache(folder, "runs", arguments.again)
    results("left alone", lambda: live_on(folder, "whole"))
    found = [
        results(f"run {n}, {arguments.kills} kills", partial(killed, folder, n, arguments.kills))
        for n in range(arguments.runs)
    ]
    counts: dict[str, Counter[str]] = {}
    for run in found:
        for moment, name in run:
            counts.setdefault(moment, Counter())[name] += 1
    names = [number.name for number in SIGNALS]
    print(f"{machine()}\n\n| moment | {' | '.join(names)} | resumed to the same bits, or begun |")
    print(f"|---|{'---|' * (len(names) + 1)}")
    for moment, by_signal in sorted(counts.items()):
        total = by_signal.total()
        print(f"| {moment} | {' | '.join(str(by_signal[name]) for name in names)} | {total} of {total} |")
    print(
        f"| all | {' | '.join(str(sum(c[name] for c in counts.values())) for name in names)} | {sum(map(len, found))} |"
    )


def recipe_of(folder: Path, name: str) -> tuple[str, Path]:
    """The recipe of a run on the one data set of all."""
    data = folder / "data"
    if not data.exists():
        write_tiny(data)
        write_shard(data / "held-out.tar", [sample(number) for number in range(200, 212)])
    evaluation = {"kind": "retrieval", "shards": "held-out.tar", "every": "10 steps", "batch_size": 4}
    changes: dict[str, Any] = {
        "duration": f"{STEPS} steps",
        "checkpoint_every": "7 steps",
        "log_every": "3 steps",
        "keep_checkpoints": 2,
        "ema": {"decay": 0.9},
        "evaluate": {"held-out": evaluation},
    }
    run = folder / name
    loading = {"workers": 1, "max_bad_share": 1}
    return write_tiny_recipe(data, run, **changes, data=loading), run


def live_on(folder: Path, name: str, before: partial[None] | None = None) -> int:
    """One life, to whatever its end is; the exit code."""
    life = start_command(
        ["train", recipe_of(folder, name)[0], "--resume", "auto"], folder / f"{name}.err", None, before
    )
    try:
        code = life.ended(600)
    finally:
        end_all([life])
    if before is None and code != 0:
        raise SystemExit(f"{folder / name}: a life ended with {code}: {life.said}")
    return -1 if code is None else code


def killed(folder: Path, number: int, kills: int) -> list[tuple[str, str]]:
    """A run that is ended so often; the moment and the signal of each end. Raises where it is another run."""
    name = f"run-{number}"
    shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / "data").iterdir():
        if path.suffix != ".tar":  # the index is made anew
            path.unlink()
    draws = random.Random(number)
    ended = []
    for kill, moment in enumerate(moments(number, kills)):
        by = SIGNALS[(kill + number) % len(SIGNALS)]
        code = end_once(folder, name, moment, by, draws)
        print(f"{name}: {moment}, {by.name}: {code}", flush=True)
        if code != EXPECTED[by]:
            raise SystemExit(f"{name}: {by.name} at {moment}: {code}: {(folder / f'{name}.err').read_text()}")
        ended.append((moment, by.name))
    live_on(folder, name)
    assert_same_run(folder / name, folder / "whole")
    return ended


def moments(number: int, kills: int) -> list[str]:
    """The moments at which the lives of a run are ended: the first at its beginning, the last at its report."""
    between = ["save", "at random", "evaluation", "rename", "at random", "prune", "at random", "evaluation"]
    middle = [between[(number + place) % len(between)] for place in range(kills - 2)]
    return [("directory made", "index")[number % 2], *middle, "report"]


def end_once(folder: Path, name: str, moment: str, number: signal.Signals, draws: random.Random) -> int:
    """Start a life and end it; its exit code."""
    if moment != "at random":
        # Not at the first time, so that the run comes on: but a report is written once, and so is an index.
        skip = draws.randint(0, 1) if moment in ("save", "rename", "prune", "evaluation") else 0
        return live_on(folder, name, partial(strike, *MOMENTS[moment], int(number), skip))
    recipe, run = recipe_of(folder, name)
    lines = num_lines(run / "metrics.jsonl") + draws.randint(1, 6)
    life: Life = start_command(["train", recipe, "--resume", "auto"], folder / f"{name}.err")
    try:
        wait_until(lambda: life.process.exitcode is not None or num_lines(run / "metrics.jsonl") >= lines, 600)
        life.ended(draws.uniform(0, 0.2))
        if life.process.exitcode is None:
            life.signal(number)
        code = life.ended(120)
    finally:
        end_all([life])
    return -1 if code is None else code


def strike(module: str, function: str, number: int, skip: int) -> None:
    """Have this process signalled at the beginning of a call of that function, `skip` calls being passed over."""
    owner = importlib.import_module(module)
    whole = getattr(owner, function)
    calls = iter(range(skip + 1))

    def struck(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) == skip:
            os.kill(os.getpid(), number)
        return whole(*args, **kwargs)

    setattr(owner, function, struck)


if __name__ == "__main__":
    main()
