"""Whole runs: the same at every world size and under every engine, and exact when they are stopped and resumed."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.recipe import load_recipe
from launch.train import train
from tests.launch.small import keys_of, losses_of, metrics_of, write_data, write_recipe
from tests.ranks import run_ranks
from vlm.checkpoint.format import Checkpoint
from vlm.training.engines.registry import EngineName

# FSDP2's run is in test_fsdp.py, with all that it goes on from.
WAYS: list[tuple[EngineName, int]] = [("ddp", 2), ("ddp", 3), ("zero1", 2), ("zero2", 2), ("zero3", 2)]


def train_recipe(path: str, overrides: tuple[str, ...], resume: str | None, allow_changes: bool = False) -> None:
    train(load_recipe(path, overrides), resume=resume, allow_changes=allow_changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_data(path)
    return path


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run under an engine and world size, made once."""

    @cache
    def once(engine: EngineName, world_size: int) -> Path:
        run = tmp_path_factory.mktemp("runs") / f"{engine}-{world_size}"
        recipe = write_recipe(folder, run, engine=engine, ema={"decay": 0.9})
        run_ranks(train_recipe, world_size, str(recipe), (), None, group=False)
        return run

    return once


def stopped_at(run: Path, step: int, to: Path) -> Path:
    """The files that a kill leaves, as they were at some moment after `step`'s checkpoint, the last lines torn."""
    shutil.copytree(run, to)
    for later in (to / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    half = to / "checkpoints" / f"step-{step + 5:08d}.partial"
    half.mkdir()
    (half / "weights-00000.safetensors").write_bytes(b"half")
    with (to / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    return to


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world_size"), WAYS)
def test_loss_curves_and_samples_are_those_of_one_process(finished: Any, engine: EngineName, world_size: int) -> None:
    alone, together = finished("ddp", 1), finished(engine, world_size)
    assert len(losses_of(alone)) == 20
    assert losses_of(together) == pytest.approx(losses_of(alone), rel=1e-4)
    assert {step: sorted(keys) for step, keys in keys_of(together).items()} == {
        step: sorted(keys) for step, keys in keys_of(alone).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size"), [("ddp", 1), pytest.param("ddp", 2, marks=pytest.mark.long), ("ddp", 3), ("zero2", 2)]
)
def test_stopped_and_resumed_the_metrics_are_bit_for_bit_the_same(
    finished: Any, tmp_path: Path, engine: EngineName, world_size: int
) -> None:
    whole = finished(engine, world_size)
    run = stopped_at(whole, 10, tmp_path / "run")
    run_ranks(train_recipe, world_size, str(whole.with_suffix(".yaml")), (f"run={run}",), "auto", group=False)
    assert metrics_of(run) == metrics_of(whole)
    assert keys_of(run) == keys_of(whole)
    assert (run / "report.html").stat().st_size > 10_000
    assert not list((run / "checkpoints").glob("*.partial"))
    ends = [Checkpoint(path / "checkpoints" / "step-00000020") for path in (run, whole)]
    for group in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        for name in ends[0].names(group):
            assert torch.equal(ends[0].tensor(group, name), ends[1].tensor(group, name)), (group, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size"), [("ddp", 1), ("zero3", 3), pytest.param("fsdp", 2, marks=pytest.mark.long)]
)
def test_a_run_goes_on_under_another_engine_and_world_size(
    finished: Any, tmp_path: Path, engine: EngineName, world_size: int
) -> None:
    whole = finished("zero2", 2)
    run = stopped_at(whole, 10, tmp_path / "run")
    overrides = (f"run={run}", f"engine={engine}")
    run_ranks(train_recipe, world_size, str(whole.with_suffix(".yaml")), overrides, "auto", group=False)
    assert losses_of(run)[10] == pytest.approx(losses_of(whole)[10], rel=1e-5)
    assert losses_of(run) == pytest.approx(losses_of(whole), rel=1e-4)
    assert [sorted(keys) for keys in keys_of(run).values()] == [sorted(keys) for keys in keys_of(whole).values()]


@pytest.mark.slow
def test_a_run_directory_holds_what_it_promises(finished: Any) -> None:
    run = finished("ddp", 1)
    first = metrics_of(run)[0]
    assert first["step"] == 1
    assert {"samples", "loss", "clip", "logit_scale", "lr", "grad_norm"} <= first.keys()
    evaluations = [line for line in metrics_of(run) if any(key.startswith("eval/") for key in line)]
    assert [line["step"] for line in evaluations] == [10, 20, 20]
    assert "eval/zeroshot/top1" in evaluations[0]
    assert "eval/retrieval/image_to_text_r@1" in {**evaluations[1], **evaluations[2]}
    assert load_recipe(str(run / "recipe.yaml")).global_batch == 12
    keys = keys_of(run)
    assert [len(keys[step]) for step in range(1, 21)] == [12] * 20
    first_epoch = [key for step in range(1, 6) for key in keys[step]]
    assert len(set(first_epoch)) == 60  # each sample once an epoch


@pytest.mark.slow
def test_a_finished_run_resumed_is_left_as_it_is(finished: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("ddp", 1), run)
    before = metrics_of(run)
    run_ranks(train_recipe, 1, str(run / "recipe.yaml"), (f"run={run}",), "auto", group=False)
    assert metrics_of(run) == before
