"""Killed at any moment and resumed, a run ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.small import keys_of, metrics_of, write_data, write_recipe

PROJECT = Path(__file__).parents[2]
_TRAIN = "import sys; sys.argv[0] = 'vlm'; from vlm.__main__ import main; main()"


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """`vlm train` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _TRAIN, "train", *arguments],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_run_killed_twice_equals_one_that_was_left_alone(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    changes = {"duration": "200 steps", "checkpoint_every": "7 steps", "evaluate": {}, "ema": {"decay": 0.9}}
    changes["data"] = {"root": str(tmp_path / "data"), "sources": {"pairs": {"shards": "train-*.tar"}}, "workers": 2}
    whole = write_recipe(tmp_path / "data", tmp_path / "whole", **changes)
    killed = write_recipe(tmp_path / "data", tmp_path / "killed", **changes)
    left_alone = start(str(whole))
    run = tmp_path / "killed"
    for least in (30, 90):
        process = start(str(killed), "--resume", "auto")
        while process.poll() is None and not (run.is_dir() and _num_lines(run / "metrics.jsonl") >= least):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was in the middle of its work
    assert start(str(killed), "--resume", "auto").wait() == 0
    assert left_alone.wait() == 0
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    assert keys_of(run) == keys_of(tmp_path / "whole")
    assert len(metrics_of(run)) == 200


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
