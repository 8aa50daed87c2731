"""A run with locked towers through its whole life: what is locked stays bit for bit, and costs no moments."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.retrieval import RetrievalConfig
from launch.evaluate import evaluate_model
from launch.export import export_model
from launch.recipe import load_recipe
from launch.verify_gradients import verify
from tests.launch.tiny import (
    MODEL,
    assert_same_run,
    stopped_at,
    train_here,
    train_ranks,
    write_tiny,
    write_tiny_recipe,
)
from tests.ranks import run_ranks
from vlm.checkpoint.format import Checkpoint
from vlm.model.build import build_model

TINY: dict[str, Any] = MODEL["architecture"]
DEEPER = {
    "architecture": {
        **TINY,
        "vision_cfg": {**TINY["vision_cfg"], "layers": 2},
        "text_cfg": {**TINY["text_cfg"], "layers": 2},
    }
}
LIT = {**DEEPER, "lock": {"image": "all"}}
LAST_BLOCKS = {**DEEPER, "lock": {"image": {"all_but": 1}, "text": {"all_but": 1}}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_tiny(tmp_path)
    return tmp_path


def assert_locked(run: Path, recipe: str, trained: tuple[str, ...]) -> None:
    """Only what is `trained` has moved since the seed, and only that has moments and averages."""
    first = build_model(load_recipe(recipe).model, seed=0).state_dict()
    last = Checkpoint(sorted((run / "checkpoints").glob("step-*"))[-1])
    moved = {name for name in first if not torch.equal(first[name], last.tensor("weights", name))}
    assert moved == {name for name in first if name.startswith(trained)}
    for group in ("exp_avg", "exp_avg_sq", "ema"):
        assert set(last.names(group)) == moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size", "model", "changes"),
    [
        ("ddp", 1, LIT, {"micro_batch": 5, "providers": {"queue": {"size": 20}}}),  # with a teacher
        ("ddp", 1, LAST_BLOCKS, {"micro_batch": 5, "providers": {"queue": {"size": 20}}}),
        pytest.param("zero2", 2, LAST_BLOCKS, {}, marks=pytest.mark.long),
        pytest.param("zero3", 2, LIT, {"micro_batch": 3}, marks=pytest.mark.long),
        pytest.param("fsdp", 2, LAST_BLOCKS, {"micro_batch": 3}, marks=pytest.mark.long),
    ],
    ids=["whole, ddp", "all but one, ddp", "all but one, zero2", "whole, zero3", "all but one, fsdp"],
)
def test_a_life_with_locked_towers(
    data: Path, engine: str, world_size: int, model: dict[str, Any], changes: dict[str, Any]
) -> None:
    run, again = data / "run", data / "again"
    sizes = {"duration": "4 steps", "checkpoint_every": "2 steps", "ema": {"decay": 0.5}}
    recipe = write_tiny_recipe(data, run, model=model, engine=engine, **sizes, **changes)
    trained: tuple[str, ...] = ("logit_scale", "image.trunk.proj", "text.")
    if model is LAST_BLOCKS:
        blocks = ("image.trunk.transformer.resblocks.1.", "text.transformer.resblocks.1.")
        trained = ("logit_scale", "image.trunk.proj", "text.text_projection", *blocks)
    if world_size == 1:
        train_here(recipe)
        train_here(recipe, (f"run={stopped_at(run, 2, again)}",), resume="auto")
    else:
        train_ranks(world_size, recipe)
        train_ranks(world_size, recipe, f"run={stopped_at(run, 2, again)}", resume="auto")
    assert_same_run(again, run)
    assert_locked(run, recipe, trained)
    if model is LIT:
        export_model(str(run), "open_clip", data / "exported", ())
        config = RetrievalConfig(kind="retrieval", shards=str(data / "train-0*.tar"), batch_size=6)
        assert evaluate_model(str(data / "exported"), config, None) == pytest.approx(
            evaluate_model(str(run), config, None)
        )


def verdict(recipe: str) -> bool:
    return verify(load_recipe(recipe))


@pytest.mark.slow
def test_gradients_of_locked_towers_are_verified(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_tiny_recipe(data, data / "run", model=LAST_BLOCKS, micro_batch=3)
    assert verdict(recipe)
    assert run_ranks(verdict, 2, write_tiny_recipe(data, data / "run", model=LIT), group=False) == [True, True]


def test_the_start_says_what_is_locked(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = {"image": "all", "text": {"all_but": 1}}
    recipe = write_tiny_recipe(data, data / "run", model={**DEEPER, "lock": lock}, duration="1 step")
    train_here(recipe)
    assert " trained, image tower locked, text tower locked but for 1 block; images" in capsys.readouterr().out
