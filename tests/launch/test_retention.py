"""A run keeps the checkpoints that its recipe names, by the figures that it measures."""

from pathlib import Path
from typing import Any

import pytest

from launch.recipe import load_recipe
from launch.train import train
from tests.launch.small import metrics_of
from tests.launch.tiny import train_here, write_tiny, write_tiny_recipe
from vlm.checkpoint.folder import complete_checkpoints
from vlm.errors import UserError

METRIC = "eval/held/text_to_image_median_rank"


def recipe_of(folder: Path, keep: dict[str, Any], every: str = "2 steps") -> str:
    evaluation = {"kind": "retrieval", "shards": "train-*.tar", "every": every, "batch_size": 16}
    changes = {"evaluate": {"held": evaluation}, "checkpoint_every": "2 steps", "keep_checkpoints": keep}
    return write_tiny_recipe(folder, folder / "run", **changes, duration="12 steps")


def best_of(run: Path, steps: int) -> list[int]:
    """The two checkpoints with the least median rank, of equal ones the newer."""
    ranks = {line["step"]: line[METRIC] for line in metrics_of(run) if METRIC in line}
    assert list(ranks) == list(range(2, steps + 1, 2))
    return sorted(ranks, key=lambda step: (ranks[step], -step))[:2]


def test_the_best_by_a_figure_is_kept_and_a_resume_knows_the_figures_of_before(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    recipe = recipe_of(tmp_path, {"last": 1, "every": "6 steps", "best": {METRIC: 2}})
    saved = tmp_path / "run" / "checkpoints"
    train_here(recipe, ("duration=8 steps",))
    assert list(complete_checkpoints(saved)) == sorted({*best_of(tmp_path / "run", 8), 6, 8})
    train(load_recipe(recipe), resume="auto", allow_changes=True)
    assert list(complete_checkpoints(saved)) == sorted({*best_of(tmp_path / "run", 12), 6, 12})


@pytest.mark.parametrize(
    ("best", "every", "words"),
    [
        (
            "eval/held/text_to_image_rank",
            "2 steps",
            "nothing in this run measures eval/held/t.*; nearest: eval/held/t",
        ),
        ("eval/held/num_images", "2 steps", "of eval/held/num_images neither way is better; nearest: eval/held/"),
        (
            METRIC,
            "7 steps",
            r"every 7 steps, checkpoints are saved every 2: before the end no .*; set evaluate.held.eve",
        ),
    ],
)
def test_a_figure_that_no_checkpoint_will_have_is_refused(tmp_path: Path, best: str, every: str, words: str) -> None:
    write_tiny(tmp_path)
    with pytest.raises(UserError, match=rf"keep_checkpoints\.best: .*{words}"):
        train_here(recipe_of(tmp_path, {"best": {best: 1}}, every))
    assert not (tmp_path / "run").exists()
