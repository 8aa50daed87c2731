"""How a recipe updates its weights: optimizer, rates and schedule, through a stop, and refused before a run is made."""

from pathlib import Path
from typing import Any

import pytest

from launch.recipe import load_recipe
from launch.train import train
from tests.launch.small import metrics_of
from tests.launch.tiny import assert_refused, assert_same_run, stopped_at, train_here, write_tiny, write_tiny_recipe

UPDATE: dict[str, Any] = {
    "optimizer": {
        "kind": "muon",
        "lr": 0.002,
        "lr_decay": {"image": 0.5, "text": 0.8},
        "undecayed": ["*positional_embedding"],
    },
    "schedule": {"kind": "constant", "warmup": "2 steps", "cooldown": {"last": "50%", "shape": "1-sqrt"}},
    "data": {"max_bad_share": 1},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that was left alone, the last 6 of which cool down, with checkpoints after 3, 6, 9 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder / "data")
    train_here(write_tiny_recipe(folder / "data", folder / "run", checkpoint_every="3 steps", **UPDATE))
    return folder / "run"


def test_muon_with_layers_and_a_cool_down_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    rates = [line["lr"] for line in metrics_of(whole)]
    cooled = [0.002 * (1 - (k / 6) ** 0.5) for k in range(6)]
    assert rates == pytest.approx([0.001, *[0.002] * 5, *cooled], abs=1e-12)
    stopped = stopped_at(whole, 9, tmp_path / "stopped")
    train_here(str(stopped / "recipe.yaml"), resume="auto")
    assert_same_run(stopped, whole)


def test_a_run_made_longer_before_its_cool_down_is_one_that_was_as_long_from_the_start(
    whole: Path, tmp_path: Path
) -> None:
    longer = stopped_at(whole, 6, tmp_path / "longer")
    recipe = load_recipe(str(longer / "recipe.yaml"), ("duration=16 steps",))
    train(recipe, resume="auto", allow_changes=True)
    always = tmp_path / "always"
    changes = {"duration": "16 steps", "checkpoint_every": "3 steps"}
    train_here(write_tiny_recipe(whole.parent / "data", always, **changes, **UPDATE))
    assert_same_run(longer, always)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": "zero2", "optimizer": {"kind": "muon"}},
            r"optimizer.kind: muon works on whole tensors, of which engine zero2 has parts; .* engine: ddp, fsdp$",
        ),
        (
            {"schedule": {"kind": "constant", "warmup": "4 steps", "cooldown": {"last": "9 steps"}}},
            r"schedule.cooldown.last: found 9 steps, which is 9 steps; behind 4 of warm-up the run has 8$",
        ),
        (
            {"optimizer": {"undecayed": ["image.nothing"]}},
            r"optimizer.undecayed: no parameter that trains is called 'image.nothing'; ",
        ),
        (
            {"optimizer": {"lr_decay": {"image": 1.5}}},
            r"optimizer.lr_decay.image: found 1.5; .* equal to 1",
        ),
        ({"optimizer": {"kind": "muonn"}}, r"optimizer.kind: there is no optimizer 'muonn'; nearest: muon"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run_is_made(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_tiny(tmp_path / "data")
    recipe = write_tiny_recipe(tmp_path / "data", tmp_path / "run", **{**changes, "data": {"max_bad_share": 1}})
    assert_refused(recipe, tmp_path / "run", message)
