"""A run writes the geometry of its embeddings: the same on any number of ranks, and in tensorboard."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, SCALARS, EventAccumulator
from typer.testing import CliRunner

from launch.main import app
from tests.launch.small import metrics_of
from tests.launch.tiny import NUM_GOOD, train_here, train_ranks, write_tiny, write_tiny_recipe


def observed(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_of(run) if any(key.startswith("geometry/") for key in line)]


@pytest.mark.slow
def test_geometry_is_written_on_the_way_and_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    changes: dict[str, Any] = {"geometry": {"every": "4 steps", "sample": 7}, "global_batch": 11}
    train_here(write_tiny_recipe(tmp_path, tmp_path / "alone", **changes, trackers=["tensorboard"]))
    train_ranks(2, write_tiny_recipe(tmp_path, tmp_path / "two", **changes, micro_batch=2))
    alone, two = observed(tmp_path / "alone"), observed(tmp_path / "two")
    assert [line["step"] for line in alone] == [line["step"] for line in two] == [4, 8, 12]
    for line, other in zip(alone, two, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            assert other[key] == pytest.approx(value, rel=2e-3, abs=2e-3), key
        assert sum(line["geometry/positive_scores"]) == 7
    (events,) = (tmp_path / "alone").rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events.parent), size_guidance={HISTOGRAMS: 0, SCALARS: 0})
    written.Reload()
    assert [event.step for event in written.Scalars("geometry/uniformity_cross")] == [4, 8, 12]
    (first, *_rest) = written.Histograms("geometry/hardest_negative_scores")
    assert first.histogram_value.num == 7


@pytest.mark.slow
def test_geometry_can_be_left_out(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train_here(write_tiny_recipe(tmp_path, tmp_path / "run", geometry={"every": None}, duration="2 steps"))
    assert not observed(tmp_path / "run")


def test_the_command_measures_a_run_writes_figures_and_draws(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train_here(write_tiny_recipe(tmp_path, tmp_path / "run", duration="2 steps", data={"max_bad_share": 0.5}))
    shards, file = str(tmp_path / "train-*.tar"), tmp_path / "figures.json"
    command = ["eval", "geometry", str(tmp_path / "run"), "--data", shards, "--json", str(file)]
    result = CliRunner().invoke(app, [*command, "--shift", "0", "--shift", "0.5", "--plots", str(tmp_path / "plots")])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    retrieved = CliRunner().invoke(app, ["eval", "retrieval", *command[2:]])
    assert retrieved.exit_code == 0, retrieved.output
    retrieval = json.loads(file.read_text())
    assert found["shift_0_image_to_text_r@1"] == retrieval["image_to_text_r@1"]
    assert {name for name in found if name.startswith("shift_")} == {
        f"shift_{shift}_{way}_r@1" for shift in ("0", "0.5") for way in ("image_to_text", "text_to_image")
    }
    assert found["num_images"] == NUM_GOOD
    assert sum(found["scores"]["positive"]) == NUM_GOOD
    assert sum(found["spectra"]["text"]) == pytest.approx(1)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"clouds.png", "scores.png", "spectra.png"}
    wrong = CliRunner().invoke(app, [*command, "--shift", "nan"])
    assert wrong.exit_code == 2
    assert "'--shift'" in wrong.output
