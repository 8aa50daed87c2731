"""Steps without a finite loss or gradient in a whole run: left out, recorded, exact on resume, few in a row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe import load_recipe
from tests.launch.small import keys_of, metrics_of
from tests.launch.tiny import assert_same_run, stopped_at, train_here, train_ranks, write_tiny, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint
from vlm.errors import UserError

POISON = "tests.vlm.training.poison:Poison"
STOPPED = "max_bad_steps: 3 steps in a row up to step 7 had a loss or a gradient that is no finite number"


def recipe_of(folder: Path, run: Path, steps: tuple[int, ...], **changes: Any) -> str:
    """The tiny run, its loss or gradient spoiled in some steps (counted from 0)."""
    objective = {"clip": 1.0, POISON: {"weight": 1.0, "steps": list(steps)}, **changes.pop("more_terms", {})}
    return write_tiny_recipe(folder, run, objective=objective, **changes)


def failures_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "failures.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_bad_step_is_told_with_its_samples_and_a_resume_goes_on_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    recipe = recipe_of(tmp_path, tmp_path / "run", (4,))
    train_here(recipe)
    told = "step 5  left out: its loss or gradient is no finite number (failures.jsonl names its samples)\n"
    assert told in capsys.readouterr().out
    (line,) = [line for line in metrics_of(tmp_path / "run") if line["step"] == 5]
    assert line == {"step": 5, "samples": 60, "steps_left_out": 1}
    assert [line["steps_left_out"] for line in metrics_of(tmp_path / "run")] == [0] * 4 + [1] * 8
    (failure,) = failures_of(tmp_path / "run")
    assert (failure["kind"], failure["step"], failure["rank"]) == ("step-left-out", 5, 0)
    assert failure["keys"] == keys_of(tmp_path / "run")[5]
    assert "loss is nan" in failure["message"]

    stopped_at(tmp_path / "run", 6, tmp_path / "again")
    again = load_recipe(recipe, (f"run={tmp_path / 'again'}",), trust=True)
    assert again.max_bad_steps == 3
    train_here(recipe, (f"run={tmp_path / 'again'}",), resume="auto")
    assert_same_run(tmp_path / "again", tmp_path / "run")


@pytest.mark.slow
def test_in_a_row_they_end_the_run_on_all_ranks_and_again_after_a_resume(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    recipe = recipe_of(tmp_path, tmp_path / "run", (4, 5, 6))
    with pytest.raises(UserError, match=STOPPED):
        train_ranks(2, recipe)
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()  # the one of step 6, after two bad steps
    assert Checkpoint(checkpoint).manifest.left_out.in_a_row == 2
    told = failures_of(tmp_path / "run")
    bad = [failure for failure in told if failure["kind"] == "step-left-out"]
    assert sorted((failure["step"], failure["rank"]) for failure in bad) == [(s, r) for s in (5, 6, 7) for r in (0, 1)]
    with pytest.raises(UserError, match=STOPPED):
        train_here(recipe, resume="auto")
    train_here(recipe, ("max_bad_steps=4",), resume="auto")
    assert metrics_of(tmp_path / "run")[-1]["steps_left_out"] == 3


@pytest.mark.slow
def test_in_the_last_step_and_unlogged_it_changes_no_weight_and_sets_off_an_alarm(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    rare: dict[str, Any] = {"log_every": "1000 steps", "checkpoint_every": "11 steps"}
    alarm = {"metric": "steps_left_out", "rises_by": 1, "over": "12 steps"}
    recipe = recipe_of(tmp_path, tmp_path / "run", (11,), alarm=[alarm], **rare)
    train_here(recipe)
    before, last = (Checkpoint(path) for path in sorted((tmp_path / "run/checkpoints").iterdir()))
    assert (before.manifest.step, last.manifest.step) == (11, 12)
    assert (before.manifest.num_updates, last.manifest.num_updates) == (11, 11)
    assert all(
        torch.equal(before.tensor("weights", name), last.tensor("weights", name)) for name in last.names("weights")
    )
    bad, told = metrics_of(tmp_path / "run")[-2:]
    assert bad == {"step": 12, "samples": 144, "steps_left_out": 1}
    assert told["alarm"] == "alarm: steps_left_out rose from 0 to 1, within 12 steps"
