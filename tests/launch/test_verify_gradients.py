"""`vlm verify-gradients` says right of a right launch, and finds each planted fault."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm.training.accumulation as accumulation
from launch.recipe import load_recipe
from launch.verify_gradients import verify
from tests.launch.tiny import MODEL, write_tiny, write_tiny_recipe
from tests.ranks import run_ranks
from vlm.distributed import row_group
from vlm.objectives.providers import queue
from vlm.objectives.rows import RowSamples
from vlm.objectives.step import PairStep
from vlm.training.engines.registry import EngineName

TINY: dict[str, Any] = MODEL["architecture"]
DROPPED = {
    "architecture": {
        **TINY,
        "vision_cfg": {**TINY["vision_cfg"], "image_size": 32, "patch_dropout": 0.5},
    }
}
QUEUED = {"providers": {"queue": {"size": 20}}}
replace = pytest.MonkeyPatch().setattr  # never undone: faults are made in ranks, which end
OBJECTIVE = {"objective": {"clip": {"weight": 1.0, "label_smoothing": 0.1}}}


def nothing() -> None:
    """No fault."""


def gather_without_gradient() -> None:
    """Each rank keeps what itself says of its rows, and loses what the others say."""

    def own_only(parts: Tensor, ranks: row_group.RowGroup, wire: object = None) -> Tensor:
        return parts[ranks.local]

    replace(row_group, "reduce_scatter_rows", own_only)


def missing_world_size_factor() -> None:
    """A mean without the factor that turns the engine's mean into a sum."""
    RowSamples.mean = lambda self, losses: losses.sum() / self.num_global  # type: ignore[method-assign]


def scale_gradient_doubled() -> None:
    """The objective's own gradient of the scale is added twice."""
    by_micro_batch = accumulation._by_micro_batch

    def twice(*arguments: Any) -> list[dict[str, Tensor]]:
        gradients = by_micro_batch(*arguments)
        gradients[-1]["logit_scale"] = 2 * gradients[-1]["logit_scale"]
        return gradients

    replace(accumulation, "_by_micro_batch", twice)


def dropout_not_replayed() -> None:
    """The second pass draws new masks."""
    seeded: set[tuple[int, ...]] = set()

    def first_time_only(*place: int) -> None:
        if place not in seeded:
            seeded.add(place)
            torch.manual_seed(hash(place) % 2**31)

    replace(accumulation, "seed_step", first_time_only)


def queue_forgets_other_ranks() -> None:
    """Each rank remembers its own rows alone."""
    whole = queue.teacher_keys

    def own_only(step: PairStep, ranks: row_group.RowGroup) -> queue.Keys:
        found = whole(step, ranks)
        return queue.Keys(*(tensor[ranks.local] for tensor in found))

    queue.teacher_keys = own_only


def verdict(recipe: str, fault: Callable[[], None]) -> bool:
    fault()
    return verify(load_recipe(recipe))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A recipe over tiny shards."""
    write_tiny(tmp_path)
    return lambda **changes: write_tiny_recipe(tmp_path, tmp_path / "run", **{**OBJECTIVE, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size", "changes"),
    [
        ("ddp", 1, {"micro_batch": 5, "model": DROPPED}),
        ("ddp", 3, {"global_batch": 11, "similarity": {"exchange": "ring"}}),
        ("ddp", 2, {"precision": "bf16", "engine_options": {"wire": "bf16"}}),
        ("ddp", 2, {"objective": {"attract_repel": 1.0}}),  # reads no scale
        ("zero2", 2, {"micro_batch": 3, **QUEUED}),
        ("zero3", 2, {"micro_batch": 2}),
        ("fsdp", 2, {"micro_batch": 2, "activation_checkpointing": ["image", "text"], **QUEUED}),
    ],
)
def test_a_right_launch_is_right(
    write: Callable[..., str], engine: EngineName, world_size: int, changes: dict[str, Any]
) -> None:
    recipe = write(engine=engine, **changes)
    assert run_ranks(verdict, world_size, recipe, nothing, group=False, timeout=60) == [True] * world_size
    assert not Path(recipe).with_suffix("").exists()  # nothing is written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "world_size", "changes"),
    [
        (gather_without_gradient, 2, {}),
        (missing_world_size_factor, 2, {}),
        (scale_gradient_doubled, 1, {"micro_batch": 4}),
        (dropout_not_replayed, 1, {"micro_batch": 4, "model": DROPPED}),
        (queue_forgets_other_ranks, 2, QUEUED),
    ],
)
def test_a_planted_fault_is_found(
    write: Callable[..., str], fault: Callable[[], None], world_size: int, changes: dict[str, Any]
) -> None:
    assert run_ranks(verdict, world_size, write(**changes), fault, group=False, timeout=60) == [False] * world_size
