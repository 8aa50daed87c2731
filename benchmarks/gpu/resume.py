"""A run in bf16 on the device, stopped at its middle and resumed, beside the same run in one go."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from benchmarks.gpu.setting import Line, Setting, relative
from benchmarks.step.systems import TINY
from data.scenes.writer import write_scenes
from vlm.checkpoint.format import Checkpoint

_STEPS = 6
_GROUPS = ("weights", "exp_avg", "exp_avg_sq")
# Kernels of a GPU may add in another order from one time to the next, those of a CPU do not.
_BOUNDS = {"cuda": 1e-2, "cpu": 0.0}


def check_resume(setting: Setting) -> list[Line]:
    """Weights and moments at the end: pinned batches of two workers, and checkpoints written beside training."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_scenes(work / "data", train=128, val=8, image_size=32, workers=1)
        whole, stopped = work / "whole", work / "stopped"
        _train(work, whole)
        shutil.copytree(whole, stopped)
        shutil.rmtree(stopped / "checkpoints" / f"step-{_STEPS:08d}")
        _train(work, stopped, "--resume", "auto")
        ends = [Checkpoint(run / "checkpoints" / f"step-{_STEPS:08d}") for run in (stopped, whole)]
        lines = []
        for group in _GROUPS:
            found, wanted = (
                torch.cat([end.tensor(group, name).flatten() for name in end.names(group)]) for end in ends
            )
            lines.append(Line(group.replace("_", " "), relative(found, wanted), _BOUNDS[setting.device]))
        return lines


def _train(work: Path, run: Path, *options: str) -> None:
    recipe = {
        "run": str(run),
        "model": {"architecture": TINY},
        "data": {"root": str(work / "data"), "sources": {"scenes": {"shards": "train-*.tar"}}, "workers": 2},
        "duration": f"{_STEPS} steps",
        "global_batch": 32,
        "precision": "bf16",
        "schedule": {"warmup": "1 step"},
        "checkpoint_every": f"{_STEPS // 2} steps",
        "keep_checkpoints": None,
        "trackers": [],
    }
    written = run.with_suffix(".yaml")
    written.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-P", "-m", "vlm", "train", str(written), *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["vlm train failed"])[-1])
