"""A checkpoint that is written while training goes on is the state at which it was begun, hashed on its way."""

import hashlib
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.vlm.checkpoint.small_disk import small_disk
from tests.vlm.checkpoint.test_format import groups, manifest
from vlm.activity import activity
from vlm.checkpoint import writer as writer_module
from vlm.checkpoint.folder import complete_checkpoints
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.writer import Writer, write_checkpoint
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.tensor_file import save_hashed

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]


def test_a_hashed_file_is_read_by_safetensors_own_reader(tmp_path: Path) -> None:
    tensors = {f"of {kind}": torch.arange(5).to(kind) for kind in [*KINDS, torch.uint8, torch.bool]}
    tensors |= {"empty": torch.zeros(0, 3), "alone": torch.tensor(7), "long": torch.randn(3, 2_000_003)}
    size, digest = save_hashed(tmp_path / "file", tensors)
    content = (tmp_path / "file").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


class Gate:
    """A disk that writes nothing before it is let: the real writing comes behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        monkeypatch.setattr(writer_module, "save_hashed", self._save)

    def _save(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, str]:
        assert self.open.wait(60)
        return save_hashed(path, tensors, metadata)


def test_training_goes_on_and_what_is_written_is_the_state_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, weight = Gate(monkeypatch), torch.arange(6.0)
    writer = Writer(tmp_path, World())
    for step in (1, 2):
        gate.open.clear()
        writer.begin(manifest(step), groups({"a": weight}), {"own": {"table": weight[: 2 * step]}})
        before = weight.clone()
        weight += 1
        assert writer.step == step
        assert not writer.is_written()
        assert list(complete_checkpoints(tmp_path)) == list(range(1, step))
        gate.open.set()
        path = writer.complete()
        assert torch.equal(Checkpoint(path).tensor("weights", "a"), before)
        assert torch.equal(Checkpoint(path).by_rank("own")[0]["table"], before[: 2 * step])
    assert writer.step is None
    Checkpoint(path).verify(World())


def test_the_copy_is_made_in_the_memory_of_the_one_before(tmp_path: Path) -> None:
    writer = Writer(tmp_path, World())
    places = []
    for step in (1, 2):
        writer.begin(manifest(step), groups({"a": torch.arange(6.0), f"only in {step}": torch.ones(2)}))
        writer.complete()
        assert len(writer._copies) == 2  # what is needed no more is not kept
        places.append(writer._copies["weights", "a"].data_ptr())
    assert places[0] == places[1]


def test_what_fails_in_the_background_is_raised_where_it_is_completed(tmp_path: Path) -> None:
    writer = Writer(tmp_path, World())
    writer.begin(manifest(1), groups({"a": torch.ones(3)}))
    writer.complete()
    writer.begin(manifest(2), groups({"a": torch.tensor([1.0, float("nan")])}))
    with pytest.raises(EveryRankError, match=r"step-00000002 cannot be written .*weights of a holds what is no f"):
        writer.complete()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(EveryRankError, match=r"step-00000001 cannot be written \(.*: Not a directory\)"):
        Writer(tmp_path / "checkpoints", World()).begin(manifest(1), groups({"a": torch.ones(3)}))


def test_a_read_only_disk_is_told_and_what_was_there_is_whole(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        before = write_checkpoint(disk, manifest(1), groups({"a": torch.ones(3)}), World())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(
            EveryRankError, match=r"step-00000002 cannot be written \(.*: Read-only file system\); those"
        ):
            write_checkpoint(disk, manifest(2), groups({"a": torch.ones(3)}), World())
        Checkpoint(before).verify(World())


def test_a_slow_disk_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a checkpoint shows that the work goes on, as often as something was written, and no more."""
    monkeypatch.setattr(writer_module, "_LOOK_SECONDS", 0.01)
    seen: list[float] = []
    monkeypatch.setattr(activity, "touch", seen.append)
    stands = threading.Event()

    def save_slowly(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, str]:
        for size in (1, 2, 3):
            path.write_bytes(bytes(size))
            limit = time.monotonic() + 60
            while len(seen) < size and time.monotonic() < limit:
                time.sleep(0.001)
        stands.wait(0.2)  # nothing is written any more
        return save_hashed(path, tensors, metadata)

    monkeypatch.setattr(writer_module, "save_hashed", save_slowly)
    writer = Writer(tmp_path, World())
    writer.begin(manifest(1), groups({"a": torch.ones(3)}))
    writer.complete()
    assert 3 <= len(seen) <= 5  # an empty file and the whole one may have been seen, too
