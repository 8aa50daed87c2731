"""Mistakes that a user can make: one clear line, exit code 2, nothing half written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.main import run
from tests.data.small_shards import picture, sample, with_json, write_shard
from tests.launch.small import metrics_of, recipe_values, write_data
from vlm.json_lines import read_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_data(path)
    return path


class CommandLine:
    """Runs `vlm` in this process and keeps what it said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """The exit code, and what stands on stderr."""
        self._monkeypatch.setattr("sys.argv", ["vlm", *arguments])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run()
        return int(caught.value.code or 0), self._capsys.readouterr().err

    def refuses(self, *arguments: str) -> str:
        """The one line with which `vlm` refuses these arguments."""
        code, said = self(*arguments)
        lines = [line for line in said.splitlines() if line.startswith("vlm: ")]
        assert code == 2, said
        assert "Traceback" not in said
        assert len(lines) == 1, said
        return lines[0]


@pytest.fixture
def vlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def write(folder: Path, tmp_path: Path) -> Any:
    """Writes the small recipe with changes; returns its path and the run directory it names."""

    def do(**changes: Any) -> tuple[str, Path]:
        values = {**recipe_values(folder, tmp_path / "run"), "duration": "3 steps", "evaluate": {}, **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path), tmp_path / "run"

    return do


def test_a_missing_recipe(vlm: CommandLine) -> None:
    assert "recipe nowhere.yaml: no such file" in vlm.refuses("train", "nowhere.yaml")


def test_an_unknown_key(vlm: CommandLine, write: Any) -> None:
    recipe, run_folder = write()
    line = vlm.refuses("train", recipe, "optimizer.learning_rte=3")
    assert "optimizer.learning_rte: unknown key (value 3)" in line
    assert not run_folder.exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective={sigmoid: 1.0}", "objective.sigmoid: the model has no logit bias; set model.init_logit_bias"),
        ("objective={supervised: 1.0}", "not every sample has one (a `cls` file beside the image)"),
        ("objective={multi_positive: {captions: all}}", "set data.caption to `all`"),
        ("alarm=[{metric: losss, falls_by: 1, over: 1 epoch}]", "alarm.0: there is no figure 'losss'; nearest: loss"),
        ("model.image_std=[0, 1, 1]", "model.image_std.0: found 0"),
    ],
)
def test_what_the_first_step_would_refuse_is_refused_before_anything_is_written(
    vlm: CommandLine, write: Any, override: str, said: str
) -> None:
    recipe, run_folder = write()
    assert said in vlm.refuses("train", recipe, override)
    assert not run_folder.exists()


def test_a_pattern_that_matches_nothing(vlm: CommandLine, write: Any, folder: Path) -> None:
    recipe, run_folder = write()
    line = vlm.refuses("train", recipe, "data.sources.pairs.shards=trian-*.tar")
    assert "data.sources.pairs" in line
    assert "trian-*.tar" in line
    assert not run_folder.exists()


def test_an_evaluation_pattern_that_matches_nothing(vlm: CommandLine, write: Any) -> None:
    recipe, run_folder = write(evaluate={"r": {"kind": "retrieval", "shards": "tset-*.tar"}})
    line = vlm.refuses("train", recipe)
    assert "evaluate.r.shards" in line
    assert "tset-*.tar" in line
    assert not run_folder.exists()


def test_a_shard_that_is_no_tar(vlm: CommandLine, write: Any, tmp_path: Path) -> None:
    (tmp_path / "photo.tar").write_bytes(picture(1))
    recipe, run_folder = write(data={"root": str(tmp_path), "sources": {"s": {"shards": "photo.tar"}}, "workers": 0})
    assert "photo.tar" in vlm.refuses("train", recipe)
    assert not run_folder.exists()


def test_shards_without_captions(vlm: CommandLine, write: Any, tmp_path: Path) -> None:
    write_shard(tmp_path / "mute.tar", [sample(n, jpg=picture(n), cls=n) for n in range(20)])
    recipe, run_folder = write(data={"root": str(tmp_path), "sources": {"s": {"shards": "mute.tar"}}, "workers": 0})
    line = vlm.refuses("train", recipe)
    assert "data.sources.s" in line
    assert "caption" in line
    assert not run_folder.exists()


def test_an_unknown_open_clip_model(vlm: CommandLine, write: Any, folder: Path) -> None:
    recipe, run_folder = write(model={"open_clip": "ViT-B-23"})
    line = vlm.refuses("train", recipe)
    assert "ViT-B-23" in line
    assert "ViT-B-32" in line
    assert not run_folder.exists()
    assert "ViT-B-32" in vlm.refuses("eval", "retrieval", "ViT-B-23", "--data", str(folder / "test-*.tar"))


def test_a_batch_that_the_ranks_cannot_share(vlm: CommandLine, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "13", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    recipe, run_folder = write()
    assert "global_batch: 12 pairs leave some of 13 ranks without any" in vlm.refuses("train", recipe)
    assert not run_folder.exists()


def test_a_run_directory_that_holds_a_run_and_what_resume_makes_of_it(vlm: CommandLine, write: Any) -> None:
    recipe, run_folder = write()
    run_train(vlm, recipe)
    before = (run_folder / "metrics.jsonl").read_bytes()
    assert "already holds a run" in vlm.refuses("train", recipe)
    line = vlm.refuses("train", recipe, "optimizer.lr=0.5", "seed=3", "--resume", "auto")
    assert "(optimizer.lr, seed)" in line
    assert "--allow-changes" in line
    assert (run_folder / "metrics.jsonl").read_bytes() == before
    run_train(vlm, recipe, "duration=5 steps", "--resume", "auto", "--allow-changes")
    assert [line["step"] for line in metrics_of(run_folder)] == [1, 2, 3, 4, 5]


def run_train(vlm: CommandLine, *arguments: str) -> None:
    code, said = vlm("train", *arguments)
    assert code == 0, said


def test_an_unwritable_directory(vlm: CommandLine, write: Any, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    place = Path("/proc/sys") if os.access(locked, os.W_OK) else locked  # root ignores permission bits
    recipe, _ = write()
    assert "cannot be written" in vlm.refuses("train", recipe, f"run={place / 'run'}")


def test_a_checkpoint_of_another_architecture(vlm: CommandLine, write: Any) -> None:
    recipe, run_folder = write()
    run_train(vlm, recipe)
    checkpoint = run_folder / "checkpoints" / "step-00000003"
    line = vlm.refuses(
        "train",
        recipe,
        f"run={run_folder.parent / 'other'}",
        "model.architecture.vision_cfg.width=48",
        "model.architecture.vision_cfg.head_width=24",
        "--resume",
        str(checkpoint),
    )
    assert "another architecture" in line
    assert "[32] but the model has [48]" in line
    assert not (run_folder.parent / "other").exists()


@pytest.mark.parametrize("name", ["nowhere/at/all", "checkpoint.pt"])
def test_a_missing_checkpoint(vlm: CommandLine, folder: Path, name: str) -> None:
    line = vlm.refuses("eval", "retrieval", name, "--data", str(folder / "test-*.tar"))
    assert f"{name}: no such checkpoint or run directory" in line


def test_wrong_evaluation_input(vlm: CommandLine, folder: Path, write: Any, tmp_path: Path) -> None:
    recipe, run_folder = write()
    run_train(vlm, recipe)
    data = ("--data", str(folder / "test-*.tar"))
    assert "--json" in vlm.refuses("eval", "retrieval", str(run_folder), *data, "--json", str(tmp_path / "no/x.json"))
    assert "nowhere.json" in vlm.refuses("eval", "zeroshot", str(run_folder), *data, "--classes", "nowhere.json")
    assert "vlm: --data: tpyo-*.tar" in vlm.refuses("eval", "retrieval", str(run_folder), "--data", "tpyo-*.tar")
    assert "--to: there is no export format 'openclip'; nearest: open_clip, or name your own" in vlm.refuses(
        "export", str(run_folder), str(tmp_path / "out"), "--to", "openclip"
    )
    assert "not a run directory" in vlm.refuses("report", str(folder))
    assert "trackers: wandbb is unknown; nearest: wandb" in vlm.refuses("train", recipe, "trackers=[wandbb]")


def test_a_corrupt_image_and_an_empty_caption_are_skipped_counted_and_named(
    vlm: CommandLine, write: Any, tmp_path: Path
) -> None:
    good = [sample(n) for n in range(20)]
    bad = [sample(100, jpg=picture(0)[:60], txt="cut off"), with_json(101, captions=["  "])]
    write_shard(tmp_path / "mixed.tar", [*good[:10], *bad, *good[10:]])
    recipe, run_folder = write(
        data={"root": str(tmp_path), "sources": {"mixed": {"shards": "mixed.tar"}}, "workers": 2}, duration="2 epochs"
    )
    run_train(vlm, recipe)
    ledger = read_lines(run_folder / "ledger.jsonl").records
    assert {line["key"] for line in ledger} == {"000100", "000101"}
    assert len(ledger) == 4  # each once an epoch, two epochs
    for line in ledger:
        assert line.keys() == {"step", "source", "shard", "key", "reason", "substitute"}
        assert line["source"] == "mixed"
        assert line["shard"].endswith("mixed.tar")
        assert line["reason"]
    keys = [
        key
        for line in (run_folder / "samples/rank-0.jsonl").read_text().splitlines()
        for key in json.loads(line)["keys"]
    ]
    assert not {"000100", "000101"} & set(keys)
    assert len(keys) == 48  # 22 samples, twice, in whole batches of 12
