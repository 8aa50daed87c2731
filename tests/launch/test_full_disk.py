"""A disk that fills: said before the checkpoint that would fail; what was there before is whole."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.launch.tiny import train_here, write_tiny, write_tiny_recipe
from tests.vlm.checkpoint.small_disk import small_disk
from tests.vlm.checkpoint.test_format import groups, manifest
from vlm.checkpoint import writer
from vlm.checkpoint.folder import complete_checkpoints
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.writer import Writer
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError
from vlm.tensor_file import save_hashed


def test_a_run_tells_of_the_checkpoint_that_will_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One takes 402,985 numbers three times, 4.84 MB: two fit on 13 MB, a third does not."""
    write_tiny(tmp_path / "data")
    with small_disk(tmp_path / "disk", 13_000_000) as disk:
        recipe = write_tiny_recipe(tmp_path / "data", disk / "run", checkpoint_every="2 steps")
        takes = r"rank 0: it takes about 0\.00484 GB, 0\.00[23]\d* GB are free there"
        with pytest.raises(UserError, match=rf"step-00000006 cannot be written \({takes}\); those before it are whole"):
            train_here(recipe)
        lines = [line for line in capsys.readouterr().out.splitlines() if "no room" in line]
        assert len(lines) == 1
        assert lines[0].startswith(f"step 4  {disk}/run/checkpoints has no room for the next checkpoint (rank 0: it ")
        saved = complete_checkpoints(disk / "run" / "checkpoints")
        assert list(saved) == [2, 4]
        Checkpoint(saved[4]).verify(World())
        assert not list((disk / "run" / "checkpoints").glob("*.partial"))


def test_a_disk_that_fills_while_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = threading.Event()

    def save_on_full_disk(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, str]:
        assert full.wait(60)
        return save_hashed(path, tensors, metadata)

    with small_disk(tmp_path / "disk", 2**20) as disk:
        large, saving = groups({"a": torch.zeros(100_000)}), Writer(disk, World())
        saving.begin(manifest(1), large)
        before = saving.complete()
        monkeypatch.setattr(writer, "save_hashed", save_on_full_disk)
        saving.begin(manifest(2), large)
        (disk / "others").write_bytes(bytes(500_000))
        full.set()
        told = r"step-00000002 cannot be written \(weights-0.*No space left on device; it takes about 0\.0004 GB, 0"
        with pytest.raises(EveryRankError, match=told):
            saving.complete()
        Checkpoint(before).verify(World())
        assert sorted(path.name for path in disk.iterdir()) == ["others", before.name]
