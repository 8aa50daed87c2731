"""Stages that train on less of each image: what each step sees, the same after a kill on either side of a boundary."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.recipe import load_recipe
from launch.verify_gradients import verify
from tests.launch.small import metrics_of
from tests.launch.tiny import (
    MODEL,
    assert_refused,
    assert_same_run,
    stopped_at,
    train_here,
    train_ranks,
    write_tiny,
    write_tiny_recipe,
)

TINY: dict[str, Any] = MODEL["architecture"]
VIT = {"architecture": {**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": 32}}}
MASKED = [{"until": "3 steps", "patch_dropout": 0.75}, {"until": "75%", "patch_dropout": 0.5}]
SHORT = {"duration": "8 steps", "checkpoint_every": "2 steps", "micro_batch": 3}


def write(folder: Path, run: Path, stages: list[dict[str, Any]] = MASKED, **changes: Any) -> str:
    keys = {"model": VIT, "image_schedule": stages, **SHORT, **changes}
    return write_tiny_recipe(folder, run, **keys)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny(folder)
    return folder


def assert_resumed_alike(recipe: str, run: Path, step: int, world_size: int) -> None:
    """Kill a run after so many steps, let it go on, and compare it with the one that nobody killed."""
    whole = Path(shutil.move(run, run.with_name("whole")))
    stopped_at(whole, step, run)
    if world_size == 1:
        train_here(recipe, resume="auto")
    else:
        train_ranks(world_size, recipe, resume="auto")
    assert_same_run(run, whole)
    shutil.rmtree(run)
    shutil.move(whole, run)


def test_each_step_leaves_out_what_its_stage_says_and_so_does_a_resumed_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    recipe = write(data, run)
    train_here(recipe)
    said = "images in stages: steps 1 to 3 without 0.75 of their patches; steps 4 to 6 without 0.5 of their patches; "
    assert said + "steps 7 to 8 whole\n" in capsys.readouterr().out
    shares = [line["patch_dropout"] for line in metrics_of(run) if "loss" in line]
    assert shares == [0.75] * 3 + [0.5] * 3 + [0.0] * 2
    assert "Patches left out" in (run / "report.html").read_text()
    for step in (2, 6):
        assert_resumed_alike(recipe, run, step, 1)


def test_two_ranks_do_so_too(data: Path, tmp_path: Path) -> None:
    recipe = write(data, tmp_path / "run")
    train_ranks(2, recipe)
    assert_resumed_alike(recipe, tmp_path / "run", 4, 2)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"until": "9 steps"}], r"^image_schedule\.0\.until: 9 steps is step 9, and the run ends after step 8$"),
        (
            [{"until": "50%"}, {"until": "4 steps"}],
            r"^image_schedule\.1\.until: 4 steps is step 4, no later than the end of the stage above it",
        ),
    ],
)
def test_stages_that_do_not_fit_the_run_are_refused(
    data: Path, tmp_path: Path, stages: list[dict[str, Any]], message: str
) -> None:
    assert_refused(write(data, tmp_path / "run", stages), tmp_path / "run", message)


def test_a_tower_without_patches_is_refused(data: Path, tmp_path: Path) -> None:
    conv = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    model = {"architecture": {**TINY, "vision_cfg": conv}}
    recipe = write(data, tmp_path / "run", [{"until": "50%"}, {"until": "60%", "patch_dropout": 0.5}], model=model)
    assert_refused(recipe, tmp_path / "run", r"^image_schedule\.1\.patch_dropout: a ConvNeXt leaves out no patches")


def test_without_images_there_is_nothing_to_schedule(data: Path, tmp_path: Path) -> None:
    recipe = write(data, tmp_path / "run", data={"images": False})
    assert_refused(recipe, tmp_path / "run", r"^image_schedule: no images are read")


def test_the_gradient_of_a_masked_step_is_that_of_one_process(data: Path, tmp_path: Path) -> None:
    assert verify(load_recipe(write(data, tmp_path / "run")))
