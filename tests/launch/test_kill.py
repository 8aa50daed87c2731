"""Killed at any moment and resumed, a run ends as if nothing had happened, and leaves no process behind."""

import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest

from tests.launch.tiny import assert_same_run, start_life, write_tiny, write_tiny_recipe

STEPS = 60
# Lines of metrics after which a life may be killed: before the first checkpoint, and in each third after it.
CHAPTERS = [(1, 6), (8, 20), (21, 36), (37, 52)]


@pytest.mark.slow
def test_a_run_killed_four_times_equals_one_that_was_left_alone(tmp_path: Path) -> None:
    write_tiny(tmp_path / "data")
    changes = {"duration": f"{STEPS} steps", "checkpoint_every": "7 steps", "ema": {"decay": 0.9}}
    recipes = {
        name: write_tiny_recipe(tmp_path / "data", tmp_path / name, **changes, data={"workers": 2, "max_bad_share": 1})
        for name in ("whole", "killed")
    }
    moments = random.Random(20)
    left_alone = start_life(recipes["whole"])
    workers: list[psutil.Process] = []
    for first, last in CHAPTERS:
        life = start_life(recipes["killed"])
        workers += killed(life, tmp_path / "killed", moments.randint(first, last), moments.uniform(0, 0.1))
    assert finished(start_life(recipes["killed"]))
    assert finished(left_alone)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert len(workers) >= 2 * len(CHAPTERS)
    assert not still_there(workers)


def killed(life: ForkServerProcess, run: Path, lines: int, seconds: float) -> list[psutil.Process]:
    """Kill a life some time after it has written so many lines of metrics; the processes that it had started."""
    while life.is_alive() and num_lines(run / "metrics.jsonl") < lines:
        time.sleep(0.005)
    time.sleep(seconds)
    assert life.pid is not None
    workers = psutil.Process(life.pid).children(recursive=True)
    os.kill(life.pid, signal.SIGKILL)
    life.join()
    assert life.exitcode == -signal.SIGKILL  # it was in the middle of its work
    return workers


def finished(life: ForkServerProcess) -> bool:
    life.join(timeout=240)
    return life.exitcode == 0


def still_there(processes: list[psutil.Process], patience: float = 30.0) -> list[psutil.Process]:
    """Those that do not end by themselves; one that ended and that nobody waits for is a zombie."""
    deadline = time.monotonic() + patience
    left = processes
    while left and time.monotonic() < deadline:
        left = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.05)
    return left


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
