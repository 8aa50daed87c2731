"""Training goes on while a checkpoint is written, and the run is that of one that waits for each."""

import errno
import os
import time
from pathlib import Path

import pytest
from torch import Tensor

from tests.launch.lives import end_all, num_lines, start_ranks
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


def _no_large_files_on_rank_1() -> None:
    """Patch the writing of this process so that rank 1 fails as on a full disk, from step 4 on."""

    def save_or_fail(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, str]:
        if os.environ["RANK"] == "1" and "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_hashed(path, tensors, metadata)

    pytest.MonkeyPatch().setattr(writer, "save_hashed", save_or_fail)  # for good: the process is its own


def test_all_ranks_end_after_the_step_at_which_one_could_not_write(tmp_path: Path) -> None:
    write_tiny(tmp_path / "data")
    run = tmp_path / "run"
    recipe = write_tiny_recipe(
        tmp_path / "data", run, duration="400 steps", checkpoint_every="2 steps", record_samples=False
    )
    lives = start_ranks(2, ["train", recipe], tmp_path / "err", _no_large_files_on_rank_1)
    try:
        assert [life.ended(120) for life in lives] == [2, 2]
    finally:
        end_all(lives)
    (line,) = lives[0].said
    assert line.startswith(f"vlm: checkpoint {run}/checkpoints/step-00000004 cannot be written (")
    assert "-00001.safetensors: [Errno 28] No space left on device; it takes about 0.0" in line
    assert line.endswith("those before it are whole: --resume auto goes on")
    assert lives[1].said == []  # it ends by the same error, which is told once
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert num_lines(run / "metrics.jsonl") < 400
