"""Checkpoints are complete or absent, and damage is noticed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlm.errors import UserError
from vlm.training.checkpoint import (
    Checkpoint,
    Group,
    Manifest,
    clear_unfinished,
    complete_checkpoints,
    first_differences,
    prune,
    write_checkpoint,
)
from vlm.world import World


def manifest(step: int) -> Manifest:
    return Manifest(
        step=step,
        samples=step * 8,
        num_updates=step,
        world_size=1,
        engine="ddp",
        threads=1,
        model={},
        data={"a": 3},
        versions={},
    )


def groups(tensors: dict[str, Tensor]) -> dict[str, Group]:
    return {"weights": ({name: tensor.numel() for name, tensor in tensors.items()}, tensors.__getitem__)}


TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "scale": torch.tensor([3.5]), "count": torch.tensor(7)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, manifest(12), groups(TENSORS), World())
    assert path.name == "step-00000012"
    checkpoint = Checkpoint(path)
    checkpoint.verify(World())
    assert checkpoint.manifest.step == 12
    assert checkpoint.shapes("weights") == {"a.weight": (2, 3), "scale": (1,), "count": ()}
    for name, tensor in checkpoint.tensors("weights").items():
        assert torch.equal(tensor, TENSORS[name])
    assert checkpoint.names("ema") == []


def test_no_pickle_is_in_a_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, manifest(1), groups(TENSORS), World())
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    path = write_checkpoint(tmp_path, manifest(1), groups(TENSORS), World())
    (file,) = path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if damage == "flip" else content[:-4])
    with pytest.raises(UserError, match=r"weights-00000\.safetensors is damaged"):
        Checkpoint(path).verify(World())


def test_a_missing_file_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, manifest(1), groups(TENSORS), World())
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="is missing"):
        Checkpoint(path)
    with pytest.raises(UserError, match="is no checkpoint"):
        Checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text("{not json")
    with pytest.raises(UserError, match="not a readable manifest"):
        Checkpoint(tmp_path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, manifest(step), groups(TENSORS), World())
    prune(tmp_path, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
    prune(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 2


_WRITER = """
import sys, torch
from pathlib import Path
from tests.vlm.training.test_checkpoint import groups, manifest
from vlm.training.checkpoint import write_checkpoint
from vlm.world import World
tensors = {str(n): torch.full((200_000,), float(n)) for n in range(20)}
step = 0
while True:
    step += 1
    write_checkpoint(Path(sys.argv[1]), manifest(step), groups(tensors), World())
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.003, 0.03, 0.06])
def test_killed_while_writing_nothing_is_lost(tmp_path: Path, delay: float) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    assert writer.stdout is not None
    for _ in range(2):
        done = int(writer.stdout.readline())
    time.sleep(delay)
    os.kill(writer.pid, signal.SIGKILL)
    rest = writer.communicate()[0].split()
    done = int(rest[-1]) if rest else done
    complete = complete_checkpoints(tmp_path)
    assert len(complete) >= done
    for path in complete:
        Checkpoint(path).verify(World())
    clear_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == complete


def test_the_first_differing_tensors_are_named() -> None:
    words = first_differences({"a": (1,), "b": (2, 3)}, {"b": (2, 4), "c": (1,)})
    assert words == "a is missing; b is [2, 4] but the model has [2, 3]; c is not in the model"
    assert first_differences({"a": (1,)}, {"a": (1,)}) is None
