"""A run under FSDP2, its options for size too, beside one process: teacher, average, evaluations, exact resumption."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch.small import losses_of, metrics_of
from tests.launch.tiny import sets_of, stopped_at, train_here, train_ranks, write_tiny, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint

ALL_AT_ONCE: dict[str, Any] = {
    "duration": "4 steps",
    "checkpoint_every": "2 steps",
    "max_grad_norm": 0.1,
    "ema": {"decay": 0.5},
    "providers": {"queue": {"size": 20}},
    "evaluate": {"geometry": {"kind": "geometry", "shards": "train-0*.tar", "every": "2 steps"}},
}
FOR_SIZE: dict[str, Any] = {
    "engine": "fsdp",
    "engine_options": {"offload": {"parameters": "cpu"}, "prefetch": 1},
    "activation_checkpointing": ["image", "text"],
}


def figures(run: Path, name: str) -> list[float]:
    return [line[name] for line in metrics_of(run) if name in line]


@pytest.mark.slow
def test_two_sharded_ranks_measure_and_learn_what_one_process_does(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    alone, sharded, again = (tmp_path / name for name in ("alone", "sharded", "again"))
    train_here(write_tiny_recipe(tmp_path, alone, **ALL_AT_ONCE))
    recipe = write_tiny_recipe(tmp_path, sharded, **FOR_SIZE, **ALL_AT_ONCE)
    train_ranks(2, recipe)
    assert losses_of(sharded) == pytest.approx(losses_of(alone), rel=1e-4)
    assert sets_of(sharded) == sets_of(alone)
    for name in ("grad_norm", "eval/geometry/hardness_entropy", "eval/geometry/alignment"):
        assert figures(alone, name)
        assert figures(sharded, name) == pytest.approx(figures(alone, name), rel=1e-3)
    train_ranks(2, recipe, f"run={stopped_at(sharded, 2, again)}", resume="auto")
    assert losses_of(again) == losses_of(sharded)
    last = [Checkpoint(run / "checkpoints" / "step-00000004") for run in (sharded, again)]
    for group in ("weights", "exp_avg", "exp_avg_sq", "ema", "teacher"):
        assert last[0].names(group)
        for name in last[0].names(group):
            assert last[0].tensor(group, name).equal(last[1].tensor(group, name)), (group, name)
