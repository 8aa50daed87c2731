"""A resumed run asks what its data holds, not where it lies."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.data.small_shards import picture, sample, write_shard
from tests.launch.small import keys_of, metrics_of
from tests.launch.test_bad_input import CommandLine
from tests.launch.tiny import stopped_at, train_here, write_tiny, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps over `data` beside it."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder / "data")
    train_here(write_tiny_recipe(folder / "data", folder / "run"))
    return folder


@pytest.fixture
def vlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def life(whole: Path, tmp_path: Path) -> list[str]:
    """The arguments that resume a copy of the run, killed after step 6, on a copy of its data in `tmp_path`."""
    stopped_at(whole / "run", 6, tmp_path / "run")
    shutil.copytree(whole / "data", tmp_path / "moved")
    recipe = str(whole / "run.yaml")
    return ["train", recipe, "--resume", "auto", f"run={tmp_path / 'run'}", f"data.root={tmp_path / 'moved'}"]


def as_first_written(manifest: Path) -> None:
    """A manifest as it was when only the samples of each source were counted."""
    stored = json.loads(manifest.read_text())
    stored["data"] = {name: source["samples"] for name, source in stored["data"].items()}
    del stored["checksum"]
    manifest.write_text(json.dumps({**stored, "format": "vlm-checkpoint-1"}))


def test_moved_data_is_gone_on_with_bit_for_bit(vlm: CommandLine, life: list[str], whole: Path, tmp_path: Path) -> None:
    code, said = vlm(*life)
    assert code == 0, said
    assert keys_of(tmp_path / "run") == keys_of(whole / "run")
    assert metrics_of(tmp_path / "run") == metrics_of(whole / "run")
    ends = [Checkpoint(path / "run" / "checkpoints" / "step-00000012") for path in (tmp_path, whole)]
    for name in ends[0].names("weights"):
        assert torch.equal(ends[0].tensor("weights", name), ends[1].tensor("weights", name))


def test_a_moved_place_hides_no_other_change_and_no_flag_hides_other_data(
    vlm: CommandLine, life: list[str], tmp_path: Path
) -> None:
    assert "(seed)" in vlm.refuses(*life, "seed=3")
    shard = tmp_path / "moved" / "train-01.tar"  # as many samples, of as many bytes, with another caption
    texts = {n: f"caption number {n}" if n != 19 else "captain number 19" for n in range(17, 22)}
    write_shard(shard, [sample(n, jpg=picture(n), txt=text) for n, text in texts.items()])
    for flags in ([], ["--allow-changes"], ["--allow-changes", "seed=3"]):
        line = vlm.refuses(*life, *flags)
        assert line.endswith(
            f"the data has changed since the checkpoint: pairs holds other samples or texts, or other names of shards, "
            f"in {shard}"
        )
    shard.unlink()
    assert "pairs had 51 samples, now there are 46" in vlm.refuses(*life)


def test_a_manifest_that_only_counts_is_gone_on_with_where_the_data_lies(
    vlm: CommandLine, life: list[str], tmp_path: Path
) -> None:
    as_first_written(tmp_path / "run" / "checkpoints" / "step-00000006" / "manifest.json")
    line = vlm.refuses(*life)
    assert "data.root changed, and of the data only the number of samples was kept" in line
    assert "--allow-changes" in line
    code, said = vlm(*life[:-1], "duration=7 steps", "--allow-changes")
    assert code == 0, said
    stored = json.loads((tmp_path / "run" / "checkpoints" / "step-00000007" / "manifest.json").read_text())
    assert stored["data"]["pairs"]["samples"] == 51
    assert stored["data"]["pairs"]["shards"] == len(stored["data"]["pairs"]["content"]) == 4
