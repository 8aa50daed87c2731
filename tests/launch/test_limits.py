"""Recipes that can never fit into memory are refused by the key that says so."""

from pathlib import Path

import psutil
import pytest

from launch.limits import require_batches_fit, require_enough_samples, require_towers_fit
from launch.recipe import Recipe, load_recipe
from tests.launch.tiny import write_tiny_recipe
from vlm.errors import EveryRankError


def recipe_with(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write_tiny_recipe(folder, folder / "run"), overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.architecture.vision_cfg.width=65536"],
            r"model.architecture.vision_cfg: width 65,536, layers 1: take 768",
        ),
        (
            ["model.architecture.text_cfg.layers=1024", "model.architecture.text_cfg.width=8192"],
            "text_cfg: width 8,192",
        ),
    ],
)
def test_towers_larger_than_memory_are_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(EveryRankError, match=words):
        require_towers_fit(recipe_with(tmp_path, *overrides).model)


def test_batches_and_queues_larger_than_memory_are_refused(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, "global_batch=16000000", "data.workers=4")
    with pytest.raises(EveryRankError, match=r"global_batch: 16,000,000 pairs, 10 batches held ready, take 22,430 GiB"):
        require_batches_fit(recipe, 16_000_000, 224, 512)  # 16e6 x 10 x 3 x 224^2 / 2^30
    documents = "data.documents={sources: {web: {shards: x.tar}}, per_step: 1000, max_images: 1024}"
    recipe = recipe_with(tmp_path, documents, "data.workers=4")
    with pytest.raises(
        EveryRankError, match=r"data.documents: 1,000 a step of up to 1,024 images each.* take 1,436 GiB"
    ):
        require_batches_fit(recipe, recipe.global_batch, 224, 512)  # 1000 x 1024 x 10 x 3 x 224^2 / 2^30
    recipe = recipe_with(tmp_path, "providers.queue.size=67108864", "objective.momentum_distillation=1")
    with pytest.raises(EveryRankError, match=r"providers.queue.size: 67,108,864 pairs of embeddings take 4,096 GiB"):
        require_batches_fit(recipe, 12, 224, 8192)


def test_a_batch_of_a_hundred_times_the_data_is_refused() -> None:
    require_enough_samples(6000, 60)
    with pytest.raises(EveryRankError, match="global_batch: 6,001 is more than 100 times the 60 samples"):
        require_enough_samples(6001, 60)


def test_what_fits_is_taken(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, "providers.queue.size=65536")
    require_towers_fit(recipe.model)
    require_batches_fit(recipe, 12, 224, 512)
    assert psutil.virtual_memory().total > 2**30
