"""Where a run goes on: the newest whole checkpoint, what was passed over told, nothing lost on the way back."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.run_record import read_run
from launch.export import export_model
from launch.model_source import load_model
from launch.recipe import load_recipe, settled
from launch.resume import Start, find_start
from launch.train import train
from launch.verify_gradients import verify
from tests.launch.small import metrics_of
from tests.launch.tiny import stopped_at, tiny_values, write_tiny
from vlm.checkpoint.folder import complete_checkpoints
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.sealed import sealed_json
from vlm.training.owner import OwnerRecord
from vlm.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that was left alone, with checkpoints after 3, 6, 9 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder / "data")
    values = tiny_values(folder / "data", folder / "run", checkpoint_every="3 steps", data={"max_bad_share": 1})
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    torch.set_num_threads(1)
    train(load_recipe(str(folder / "run.yaml")))
    assert not (folder / "run/owner.json").exists()
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def start_of(run: Path, resume: str = "auto", **changes: Any) -> Start:
    """From where `vlm train RUN/recipe.yaml --resume ...` goes on."""
    recipe = settled(load_recipe(str(run / "recipe.yaml")))
    assert recipe.run == str(run)
    directory = RunDirectory(run, World())
    try:
        return find_start(directory, recipe.model_copy(update=changes), resume, allow_changes=False)
    finally:
        directory.release()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_the_newest_checkpoint_is_said(whole: Path) -> None:
    start = start_of(whole)
    assert (start.step, start.notices) == (12, (f"resuming from step 12 ({whole}/checkpoints/step-00000012)",))


@pytest.mark.parametrize("name", ["manifest.json", "weights-00000.safetensors", "exp_avg_sq-00000.safetensors"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(run: Path, name: str) -> None:
    flip(run / "checkpoints/step-00000012" / name)
    (run / "checkpoints/step-00000009" / name).unlink()
    start = start_of(run)
    assert start.step == 6
    over, *missing, last = start.notices[1:]  # the first says that the run was copied
    assert over.startswith(f"{run}/checkpoints/step-00000012 is passed over: ")
    assert f"step-00000012{'/' if name == 'manifest.json' else ': '}{name} is damaged" in over
    # A folder without a manifest is none that was completed.
    assert [name in line for line in missing] == [True] * (name != "manifest.json")
    assert last.startswith("resuming from step 6 (")
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        start_of(run, str(run / "checkpoints/step-00000012"))


def test_no_whole_checkpoint_and_none_at_all_are_refused(run: Path) -> None:
    for path in complete_checkpoints(run / "checkpoints").values():
        flip(path / "weights-00000.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint is whole; .*step-00000012.* is damaged .*step-00000003"):
        start_of(run)
    before = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"saved checkpoints, the last after step 12, and none is left in .*; put one"):
        start_of(run)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert not (run / "owner.json").exists()


def test_a_run_killed_before_its_first_checkpoint_says_that_it_begins(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "history.jsonl").write_text('{"time": 0, "event": "began", "step": 0}\n')
    start = start_of(run)
    assert start.checkpoint is None
    assert start.notices[-1] == "no checkpoint was saved yet: beginning at step 0"


def test_what_a_run_without_history_logged_is_kept_when_its_checkpoints_are_gone(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "history.jsonl").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    assert start_of(run).checkpoint is None
    directory = RunDirectory(run, World())
    directory.claim(resuming=True)
    (said,) = directory.start({}, {})
    assert said == f"going on from step 0: what was logged until now lies in {run}/set-aside/1 now"
    assert (run / "set-aside/1/metrics.jsonl").read_bytes() == before


def test_a_newer_version_s_checkpoint_is_never_passed_over(run: Path) -> None:
    path = run / "checkpoints/step-00000012/manifest.json"
    path.write_text(json.dumps({"format": "vlm-checkpoint-9"}))
    with pytest.raises(UserError, match="a newer version of vlm wrote it"):
        start_of(run)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("recipe.yaml", b"seed: 1\n  x: [", r"recipe\.yaml: not readable as YAML"),
        ("recipe.yaml", b"[1]", r"recipe\.yaml: expected a mapping"),
        ("recipe.yaml", None, r"recipe\.yaml is damaged, or was edited"),
        ("metrics.jsonl", None, r"metrics\.jsonl: line \d+ is damaged"),
        ("metrics.jsonl", b"[1]\n", r"metrics\.jsonl: line 1 is damaged"),
        ("metrics.jsonl", b'{"step": "x"}\n', r"metrics\.jsonl: line 1 is damaged"),
        ("metrics.jsonl", b"\xff\n", r"metrics\.jsonl: line 1 is damaged"),
        ("ledger.jsonl", b'{"step": 1}\n{}\n', r"ledger\.jsonl: line 2 is damaged"),
        ("history.jsonl", b"\n", r"history\.jsonl: line 1 is damaged"),
        ("samples/rank-0.jsonl", b"{}\n", r"rank-0\.jsonl: line 1 is damaged"),
    ],
)
def test_a_damaged_file_of_the_run_is_named(run: Path, name: str, content: bytes | None, said: str) -> None:
    path = run / name
    if content is None:
        content = path.read_bytes().replace(b"12", b"1\x02", 1)
    recipe = settled(load_recipe(str(run / "recipe.yaml")))
    path.write_bytes(content)
    directory = RunDirectory(run, World())
    with pytest.raises(UserError, match=said) as caught:
        find_start(directory, recipe, "auto", allow_changes=False)
    directory.release()
    assert "\n" not in str(caught.value)


def test_a_copied_run_goes_on_by_itself(whole: Path, run: Path) -> None:
    start = start_of(run)
    assert start.checkpoint is not None
    assert start.checkpoint.folder == run / "checkpoints/step-00000012"
    assert start.notices[0] == f"{run} was copied or moved from '{whole}': it goes on where it lies"


def test_keys_that_a_newer_version_added_are_no_changes(run: Path) -> None:
    stored = yaml.safe_load((run / "recipe.yaml").read_text())
    del stored["geometry"], stored["similarity"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(stored))
    assert start_of(run).step == 12
    with pytest.raises(UserError, match=r"the recipe has changed since the run began \(seed\)"):
        start_of(run, seed=3)


def test_no_reader_takes_a_damaged_checkpoint(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints/step-00000012"
    flip(checkpoint / "weights-00000.safetensors")
    said = r"step-00000012: weights-00000\.safetensors is damaged"
    recipe = load_recipe(str(run / "recipe.yaml"))
    pretrained = recipe.model.model_copy(update={"pretrained": str(checkpoint)})
    readers: list[Callable[[], object]] = [
        lambda: load_model(str(run)),
        lambda: export_model(str(checkpoint), "open_clip", tmp_path / "exported", ()),
        lambda: build_model(pretrained),
        lambda: verify(recipe, checkpoint),
        lambda: train(recipe, resume=str(checkpoint)),
    ]
    for read in readers:
        with pytest.raises(UserError, match=said):
            read()
    assert not (tmp_path / "exported").exists()
    assert not (run / "owner.json").exists()


def test_a_run_that_is_being_written_is_left_alone(run: Path) -> None:
    parent = os.getppid()
    began = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    owner = OwnerRecord.of_this_process(run).model_copy(update={"pid": parent, "began": began})
    (run / "owner.json").write_text(sealed_json(json.loads(owner.model_dump_json())))
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    for resume in ("auto", None):
        with pytest.raises(UserError, match=rf"is being written by process {parent} on "):
            train(load_recipe(str(run / "recipe.yaml")), resume=resume)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    read_run(run)  # readers need no leave
    copy = shutil.copytree(run, run.with_name("copy"))
    assert start_of(copy).step == 12


@pytest.mark.slow
def test_gone_back_and_killed_the_new_way_is_gone_on_with(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped_at(whole, 9, tmp_path / "run")
    recipe = load_recipe(str(run / "recipe.yaml"), ("keep_checkpoints=2", "checkpoint_every=1 steps"))
    train(recipe, resume=str(run / "checkpoints/step-00000003"))
    said = capsys.readouterr().out
    assert f"the checkpoints of steps 6, 9 and the log until then lie in {run}/set-aside/1 now" in said
    assert list(complete_checkpoints(run / "set-aside/1")) == [6, 9]
    assert list(complete_checkpoints(run / "checkpoints")) == [11, 12]
    assert metrics_of(run) == metrics_of(whole)
    shutil.rmtree(run / "checkpoints/step-00000012")  # as after a kill
    assert start_of(run).notices == (f"resuming from step 11 ({run}/checkpoints/step-00000011)",)
