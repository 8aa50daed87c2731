"""Training goes on while a checkpoint is written, and the run is that of one that waits for each."""

import time
from pathlib import Path

import pytest
from torch import Tensor

from tests.launch.lives import num_lines
from tests.launch.tiny import assert_same_run, train_here, write_tiny, write_tiny_recipe
from vlm.checkpoint import writer
from vlm.checkpoint.format import Checkpoint
from vlm.json_lines import read_lines
from vlm.tensor_file import save_hashed

STEPS = 6


def test_steps_are_taken_while_a_slow_disk_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "data")
    changes = {"duration": f"{STEPS} steps", "checkpoint_every": "2 steps", "ema": {"decay": 0.9}}
    runs = {where: tmp_path / where for where in ("background", "foreground")}
    recipes = {where: write_tiny_recipe(tmp_path / "data", run, **changes) for where, run in runs.items()}
    train_here(recipes["foreground"], ("checkpoint_in_background=false",))

    def save_slowly(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, str]:
        """Write when the step after the checkpoint's is in the log, which it never is where training waits."""
        saved, limit = int(path.parent.name[5:13]), time.monotonic() + 60
        while num_lines(runs["background"] / "metrics.jsonl") < min(saved + 1, STEPS):
            assert time.monotonic() < limit
            time.sleep(0.005)
        return save_hashed(path, tensors, metadata)

    monkeypatch.setattr(writer, "save_hashed", save_slowly)
    train_here(recipes["background"])
    assert_same_run(runs["background"], runs["foreground"])
    for step in (2, 4, 6):
        records = [Checkpoint(run / f"checkpoints/step-{step:08d}").manifest.files for run in runs.values()]
        assert records[0] == records[1]
    history = [(line["event"], line["step"]) for line in read_lines(runs["background"] / "history.jsonl").records]
    assert history == [("began", 0), ("saved", 2), ("saved", 4), ("saved", 6)]
