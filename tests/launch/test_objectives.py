"""Runs whose objective remembers: queues, teachers, per-sample tables through ranks, micro-batches and resumption."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.small_shards import with_json, write_shard
from tests.launch.small import losses_of, metrics_of
from tests.launch.tiny import MODEL, assert_same_run, stopped_at, train_here, train_ranks, write_tiny, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint
from vlm.model.config import ModelConfig

REMEMBERING: dict[str, Any] = {
    "objective": {
        "clip": 1.0,
        "individual_temperature": {"weight": 0.5, "temperature_init": 0.1},
        "momentum_distillation": {"weight": 0.5, "queue_size": 20},
        "clustered_negatives": {"weight": 0.2, "form": "learned_weights", "hidden": 4},
    },
    "providers": {"queue": {"size": 25, "attach_to": ["clip"]}},
    "global_batch": 11,
    "micro_batch": 2,
    "ema": {"decay": 0.9},
}


@pytest.mark.slow
def test_ranks_micro_batches_and_a_change_of_world_size_leave_the_run_what_it_is(tmp_path: Path) -> None:
    """Eleven pairs on one rank at once; on three ranks in twos; and by three ranks up to step 6, then by two."""
    write_tiny(tmp_path)
    alone = write_tiny_recipe(tmp_path, tmp_path / "alone", **{**REMEMBERING, "micro_batch": None})
    train_here(alone)
    three = write_tiny_recipe(tmp_path, tmp_path / "three", **REMEMBERING)
    train_ranks(3, three)
    moved = write_tiny_recipe(tmp_path, tmp_path / "moved", **REMEMBERING)
    stopped_at(tmp_path / "three", 6, tmp_path / "moved")
    train_ranks(2, moved, resume="auto")
    expected = losses_of(tmp_path / "alone")
    assert len(expected) == 12
    assert losses_of(tmp_path / "three") == pytest.approx(expected, rel=1e-4)
    assert losses_of(tmp_path / "moved") == pytest.approx(expected, rel=1e-4)
    names = ("clip", "individual_temperature", "momentum_distillation", "clustered_negatives")
    for line, other in zip(metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "moved"), strict=True):
        assert [other[name] for name in names] == pytest.approx([line[name] for name in names], rel=1e-3)


@pytest.mark.slow
def test_a_resumed_run_with_memory_is_bit_for_bit_the_run_that_never_stopped(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    whole = write_tiny_recipe(tmp_path, tmp_path / "whole", **REMEMBERING)
    train_here(whole)
    stopped = write_tiny_recipe(tmp_path, tmp_path / "stopped", **REMEMBERING)
    stopped_at(tmp_path / "whole", 6, tmp_path / "stopped")
    train_here(stopped, resume="auto")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_all_captions_of_an_image_are_its_positives_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Images with one to three captions, on one rank at once and on two ranks in micro-batches."""
    captioned = [with_json(n, captions=[f"view {view} of {n}" for view in range(1 + n % 3)]) for n in range(30)]
    write_shard(tmp_path / "train-00.tar", captioned)
    changes: dict[str, Any] = {
        "objective": {"multi_positive": {"captions": "all", "by": "sample"}, "ordering": 0.5},
        "data": {"caption": "all"},
        "global_batch": 7,
    }
    train_here(write_tiny_recipe(tmp_path, tmp_path / "alone", **changes))
    train_ranks(2, write_tiny_recipe(tmp_path, tmp_path / "two", **changes, micro_batch=2))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-4)


@pytest.mark.slow
def test_what_a_term_learns_is_not_part_of_the_model_that_leaves_the_run(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    recipe = write_tiny_recipe(tmp_path, tmp_path / "run", **{**REMEMBERING, "duration": "2 steps"})
    train_here(recipe)
    checkpoint = Checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002")
    learned = [name for name in checkpoint.names("weights") if name.startswith("term_parameters.")]
    assert learned
    assert not set(learned) & checkpoint.inference_weights().keys()
    ModelConfig.model_validate(checkpoint.manifest.model)


@pytest.mark.slow
def test_a_fixed_temperature_stays_where_it_starts_through_ranks_micro_batches_and_a_resume(tmp_path: Path) -> None:
    """The geometry terms under their preset, with the scale out of the optimizer."""
    write_tiny(tmp_path)
    fixed: dict[str, Any] = {
        "objective": "gap-cuaxu",
        "global_batch": 11,
        "model": {**MODEL, "learn_logit_scale": False},
    }
    alone = write_tiny_recipe(tmp_path, tmp_path / "alone", **fixed)
    train_here(alone)
    resumed = write_tiny_recipe(tmp_path, tmp_path / "resumed", **fixed)
    stopped_at(tmp_path / "alone", 6, tmp_path / "resumed")
    train_here(resumed, resume="auto")
    assert_same_run(tmp_path / "resumed", tmp_path / "alone")
    train_ranks(2, write_tiny_recipe(tmp_path, tmp_path / "two", **fixed, micro_batch=2))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-4)
    scales = {line["logit_scale"] for run in ("alone", "two") for line in metrics_of(tmp_path / run)}
    assert [*scales] == pytest.approx([1 / 0.07], rel=1e-6)
    assert set(metrics_of(tmp_path / "two")[0]) >= {"clip", "uniformity", "alignment"}


@pytest.mark.slow
def test_several_heads_with_temperatures_and_whitening_train_and_resume_alike(tmp_path: Path) -> None:
    """Parameters of these terms are trained by ranks as by one process, and come back bit for bit."""
    write_tiny(tmp_path)
    head = {"kind": "linear", "dim": 4, "heads": 3}
    values: dict[str, Any] = {
        "objective": {"clip": 1.0, "multi_head": {"heads": 3, "hidden": 5}, "whitening": {"group_size": 4}},
        "model": {**MODEL, "image_head": head, "text_head": head},
        "global_batch": 11,
    }
    alone = write_tiny_recipe(tmp_path, tmp_path / "alone", **values)
    train_here(alone)
    resumed = write_tiny_recipe(tmp_path, tmp_path / "resumed", **values)
    stopped_at(tmp_path / "alone", 6, tmp_path / "resumed")
    train_here(resumed, resume="auto")
    assert_same_run(tmp_path / "resumed", tmp_path / "alone")
    train_ranks(2, write_tiny_recipe(tmp_path, tmp_path / "two", **values, micro_batch=2, engine="zero2"))
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-4)
    steps = [int(path.name.removeprefix("step-")) for path in (tmp_path / "two" / "checkpoints").iterdir()]
    ends = [Checkpoint(tmp_path / run / "checkpoints" / f"step-{max(steps):08d}") for run in ("alone", "two")]
    learned = [name for name in ends[0].names("weights") if name.startswith("term_parameters.")]
    assert {name.split(".")[1].split("__of__")[0] for name in learned} == {"multi_head", "whitening"}
    for name in learned:
        first, second = (end.tensor("weights", name) for end in ends)
        torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-4)
