"""Spikes in a whole run: left out, or rolled back; a resume does the same, and the record says what was left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe import load_recipe
from launch.train import train
from tests.launch.small import keys_of, metrics_of
from tests.launch.tiny import assert_same_run, stopped_at, train_here, train_ranks, write_tiny, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import Stretch
from vlm.errors import UserError

SPIKE, POISON = "tests.vlm.training.poison:Spike", "tests.vlm.training.poison:Poison"
WATCHED = {"figures": ["loss"], "z": 30, "window": 3}
BACK = {**WATCHED, "action": "roll_back", "steps_back": 4}


def recipe_of(folder: Path, run: Path, guard: dict[str, Any] | None, *steps: int, rank: int = 0, **changes: Any) -> str:
    """The tiny run, saved every three steps, with spikes in some (counted from 0); without a guard they are NaN."""
    term = {"weight": 1.0, "steps": list(steps), "rank": rank}
    terms = {SPIKE: {**term, "loss": 200.0}} if guard is not None else {POISON: term}
    usual = {"checkpoint_every": "3 steps", "max_bad_steps": 10, "objective": {"clip": 1.0, **terms}}
    return write_tiny_recipe(folder, run, **{**usual, "guard": guard, **changes})


def last_of(run: Path) -> Checkpoint:
    return Checkpoint(sorted((run / "checkpoints").iterdir())[-1])


def assert_same_weights(run: Path, other: Path) -> None:
    """The weights and moments at the end, bit for bit."""
    first, second = last_of(run), last_of(other)
    for group in ("weights", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(first.tensor(group, name), second.tensor(group, name)) for name in first.names(group))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny(folder)
    return folder


@pytest.mark.slow
def test_a_spike_is_left_out_as_a_step_without_a_number_is(data: Path, tmp_path: Path) -> None:
    train_here(recipe_of(data, tmp_path / "spike", WATCHED, 4, 8))
    train_here(recipe_of(data, tmp_path / "nan", None, 4, 8))
    assert_same_weights(tmp_path / "spike", tmp_path / "nan")
    lines = metrics_of(tmp_path / "spike")
    assert [line["steps_left_out"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    failures = [json.loads(line) for line in (tmp_path / "spike/failures.jsonl").read_text().splitlines()]
    assert [(failure["kind"], failure["step"]) for failure in failures] == [("spike", 5), ("spike", 9)]
    assert failures[1]["keys"] == keys_of(tmp_path / "spike")[9]
    assert last_of(tmp_path / "spike").manifest.spikes.left_out == (Stretch(first=5, last=5), Stretch(first=9, last=9))


@pytest.mark.slow
def test_a_roll_back_undoes_the_steps_before_and_a_resume_does_it_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after the roll-back before it was saved, or later; weights are those of a run without all these steps."""
    whole = tmp_path / "whole"
    train_here(recipe_of(data, whole, BACK, 7))
    said = capsys.readouterr().out
    assert "step 8  rolled back to step 3: the loss is 20" in said
    assert "; the 5 steps since then are left out (failures.jsonl names the samples of the last)" in said
    train_here(recipe_of(data, tmp_path / "nan", None, 3, 4, 5, 6, 7))
    assert_same_weights(whole, tmp_path / "nan")
    manifest = last_of(whole).manifest
    assert (manifest.left_out.total, manifest.num_updates) == (5, 7)
    assert manifest.spikes.left_out == (Stretch(first=4, last=8),)
    assert {"step": 8, "samples": 96, "rolled_back_to": 3} in metrics_of(whole)
    for step in (6, 9):
        again = tmp_path / f"again-{step}"
        stopped_at(whole, step, again)
        train_here(recipe_of(data, again, BACK, 7), resume="auto")
        assert_same_run(again, whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_where_none_is_left_the_step_alone_is_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    recipe = recipe_of(data, run, BACK, 7)
    train_here(recipe, ("duration=7 steps",))
    (weights,) = (run / "checkpoints/step-00000003").glob("weights-*")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    train(load_recipe(recipe, trust=True), resume="auto", allow_changes=True)
    said = capsys.readouterr().out
    assert f"{run}/checkpoints/step-00000003 is passed over: " in said
    assert "step 8  left out: the loss is 20" in said
    assert "; no checkpoint is of before (failures.jsonl names its samples)" in said
    assert last_of(run).manifest.spikes.left_out == (Stretch(first=8, last=8),)


@pytest.mark.slow
def test_what_a_roll_back_may_need_is_kept_and_the_way_that_was_left_is_not_gone_back_to(
    data: Path, tmp_path: Path
) -> None:
    """Of steps 3, 6 and 9, the one of 6 is undone in step 8; a spike in step 11 goes back to 3 again."""
    run = tmp_path / "run"
    train_here(recipe_of(data, run, BACK, 7, 10, keep_checkpoints=1))
    assert [line["rolled_back_to"] for line in metrics_of(run) if "rolled_back_to" in line] == [3, 3]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000012"]
    assert last_of(run).manifest.spikes.left_out == (Stretch(first=4, last=11),)


@pytest.mark.slow
def test_one_spike_too_many_ends_the_run_and_more_may_be_allowed_then(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = recipe_of(data, run, {**WATCHED, "most": 1}, 7, 10)
    message = (
        r"guard: 2 spikes within 1000 steps, the last in step 11 \(the loss is 20\d\.\d, above .*\); failures.jsonl "
    )
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=message):
            train_here(recipe, resume=resume)
    train_here(recipe, ("guard.most=2",), resume="auto")
    assert last_of(run).manifest.spikes.spikes == (8, 11)


@pytest.mark.slow
def test_two_ranks_go_back_together_and_again_after_a_resume(data: Path, tmp_path: Path) -> None:
    """The spike is in the part of one rank alone. (The profile of some steps has the communication of both.)"""
    whole, again = tmp_path / "whole", tmp_path / "again"
    profile = {"steps": "2..3"}
    train_ranks(2, recipe_of(data, whole, BACK, 7, rank=1, profile=profile))
    assert len(list(whole.glob("profile/steps-2-3-rank-[01].json.gz"))) == 2
    (table,) = [line["profile/phases"] for line in metrics_of(whole) if "profile/phases" in line]
    assert table["rows"]["communication"][0] > 0
    assert table["rows"]["collectives, beside other work"][0] > 0
    assert last_of(whole).manifest.spikes.left_out == (Stretch(first=4, last=8),)
    stopped_at(whole, 6, again)
    train_ranks(2, recipe_of(data, again, BACK, 7, rank=1, profile=profile), resume="auto")
    assert_same_run(again, whole)
