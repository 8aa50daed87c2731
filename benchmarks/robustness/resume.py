"""Samples that runs train on at every world size and number of workers, killed at random moments, resumed elsewhere.

    python -P -m benchmarks.robustness.resume [FOLDER] [--kills 20]

Real runs of a tiny model, on data with broken samples; rows of the table are checks, each against a run left alone.
Finished runs stay in FOLDER, and a script that was stopped goes on where it was.
"""

import argparse
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.launch.small import keys_of, metrics_of
from tests.launch.tiny import (
    assert_same_run,
    ledger_of,
    sets_of,
    start_life,
    stopped_at,
    train_ranks,
    write_tiny,
    write_tiny_recipe,
)

WORLDS, WORKERS = (1, 2, 3, 4), (0, 1, 2, 3)
GRID_STEPS, CHECKPOINT_EVERY, KILLED_STEPS = 12, 4, 300
ROUTES = {"2 to 1": (2, 1), "2 to 3": (2, 3), "2 to 4": (2, 4), "2 to 4 to 1": (2, 4, 1)}


def main() -> None:
    """Run what is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/resume"))
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if not (folder / "data").exists():
        write_tiny(folder / "data-new")
        (folder / "data-new").rename(folder / "data")
    print("| check | runs | result |\n|---|---|---|")
    for check, runs, result in (*grid(folder), *routes(folder), *kills(folder, arguments.kills)):
        print(f"| {check} | {runs} | {result} |", flush=True)


def grid(folder: Path) -> Iterator[tuple[str, int, str]]:
    """All worlds and workers against one process that loads its data itself."""
    alone = whole_run(folder, 1, 0)
    for world_size in WORLDS:
        same = []
        for workers in WORKERS:
            run = whole_run(folder, world_size, workers)
            same.append(sets_of(run) == sets_of(alone) and skips_of(run) == skips_of(alone))
        ways = f"{world_size} ranks x {', '.join(map(str, WORKERS))} workers: the same sets in each global batch"
        yield ways, len(same), f"{sum(same)} of {len(same)} the same"


def routes(folder: Path) -> Iterator[tuple[str, int, str]]:
    """Runs of two ranks that go on as other numbers of ranks."""
    whole = whole_run(folder, 2, 1)
    for name, worlds in ROUTES.items():
        run = folder / f"route-{'-'.join(map(str, worlds))}"
        if not finished(run):
            before = whole
            for place, world_size in enumerate(worlds[1:], start=1):
                cut = run.with_name(f"{run.name}-cut")
                shutil.rmtree(cut, ignore_errors=True)
                stopped_at(before, place * CHECKPOINT_EVERY, cut)
                shutil.rmtree(run, ignore_errors=True)
                before = cut.rename(run)
                train_ranks(world_size, str(whole.with_suffix(".yaml")), f"run={run}", resume="auto")
            mark_finished(run)
        same = sets_of(run) == sets_of(whole) and skips_of(run) == skips_of(whole)
        yield f"resumed, {name} ranks: the same sequence of global batches", len(worlds), "same" if same else "DIFFERS"


def kills(folder: Path, wanted: int) -> Iterator[tuple[str, int, str]]:
    """A run killed again and again, and the same run left alone."""
    changes = {
        "duration": f"{KILLED_STEPS} steps",
        "checkpoint_every": "7 steps",
        "keep_checkpoints": 2,
        "ema": {"decay": 0.9},
    }
    whole, killed = folder / "left-alone", folder / "killed"
    for run in (whole, killed):
        write_tiny_recipe(folder / "data", run, **changes, data={"workers": 2, "max_bad_share": 1})
    if not finished(whole):
        shutil.rmtree(whole, ignore_errors=True)
        live(whole)
    history = folder / "kills.json"
    if not finished(killed):
        kill_often(killed, wanted, json.loads(history.read_text()) if history.exists() else [], history)
        live(killed)
    moments = json.loads(history.read_text())
    assert_same_run(killed, whole)
    steps = f"after steps {', '.join(map(str, moments))}"
    yield (
        f"killed {len(moments)} times ({steps}): samples, skips, metrics, weights, moments",
        len(moments) + 1,
        "same bits",
    )
    lines = len(metrics_of(killed)), len(keys_of(killed)), len(ledger_of(killed))
    yield f"of these: {lines[0]} lines of metrics, {lines[1]} batches, {lines[2]} skips", 1, "same"


def kill_often(run: Path, wanted: int, moments: list[int], history: Path) -> None:
    """Kill lives until there were enough kills: at random steps, and every fourth at a random time of its start."""
    while len(moments) < wanted:
        draws = random.Random(len(moments))
        most = KILLED_STEPS * 9 * (len(moments) + 1) // (10 * (wanted + 1))  # leaves something for the other lives
        step, patience = draws.randint(min(last_step(run), most), most), float("inf")
        if len(moments) % 4 == 3:
            patience = draws.uniform(0, 2)
        life, began = start_life(str(run.with_suffix(".yaml"))), time.monotonic()
        while life.is_alive() and last_step(run) < step and time.monotonic() - began < patience:
            time.sleep(0.005)
        time.sleep(draws.uniform(0, 0.1))
        if not life.is_alive():
            raise SystemExit(f"{run}: a life ended by itself, exit code {life.exitcode}")
        assert life.pid is not None
        os.kill(life.pid, signal.SIGKILL)
        life.join()
        moments.append(last_step(run))
        history.write_text(json.dumps(moments))


def whole_run(folder: Path, world_size: int, workers: int) -> Path:
    """A run of the grid, made once."""
    run = folder / f"world-{world_size}-workers-{workers}"
    if not finished(run):
        shutil.rmtree(run, ignore_errors=True)
        changes = {"duration": f"{GRID_STEPS} steps", "checkpoint_every": f"{CHECKPOINT_EVERY} steps"}
        train_ranks(world_size, write_tiny_recipe(folder / "data", run, **changes, data={"workers": workers}))
        mark_finished(run)
    return run


def live(run: Path) -> None:
    """One life to the end."""
    life = start_life(str(run.with_suffix(".yaml")))
    life.join()
    if life.exitcode != 0:
        raise SystemExit(f"{run}: exit code {life.exitcode}")
    mark_finished(run)


def finished(run: Path) -> bool:
    """Whether a run came to its end."""
    return run.with_suffix(".finished").exists()


def mark_finished(run: Path) -> None:
    """Note beside a run that it need not be made again."""
    run.with_suffix(".finished").touch()


def last_step(run: Path) -> int:
    """The number of lines of metrics that a run has written."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def skips_of(run: Path) -> list[tuple[int, str, str, str]]:
    """Each skipped sample: its step, its key, the reason and its substitute."""
    return sorted((line["step"], line["key"], line["reason"], line["substitute"]) for line in ledger_of(run))


if __name__ == "__main__":
    main()
