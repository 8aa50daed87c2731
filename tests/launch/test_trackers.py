"""wandb knows the recipe and the name of a run, and goes on with it after a resume; its folder is the run's."""

from pathlib import Path

import pytest

from tests.launch.tiny import train_here, write_tiny, write_tiny_recipe
from vlm.errors import UserError


def test_wandb_goes_on_with_the_run_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write_tiny(tmp_path)
    recipe = write_tiny_recipe(tmp_path, tmp_path / "my-run", trackers=["wandb"], checkpoint_every="2 steps")
    train_here(recipe, ("duration=2 steps",))
    run = tmp_path / "my-run"
    kept = (run / "wandb-id").read_text().strip()
    from launch.recipe import load_recipe
    from launch.train import train

    train(load_recipe(recipe, ("duration=3 steps",)), resume="auto", allow_changes=True)
    assert (run / "wandb-id").read_text().strip() == kept
    lives = sorted((run / "wandb").glob("offline-run-*"))
    assert len(lives) == 2
    assert all(life.name.endswith(f"-{kept}") for life in lives)
    for life in lives:
        (record,) = life.glob("*.wandb")
        content = record.read_bytes()
        assert b"my-run" in content
        assert b"global_batch" in content
    assert list(here.iterdir()) == []


def test_a_tracker_that_is_unknown_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    with pytest.raises(UserError, match="trackers: wandbb is unknown; nearest: wandb"):
        train_here(write_tiny_recipe(tmp_path, tmp_path / "run", trackers=["wandbb"]))
    assert not (tmp_path / "run").exists()
