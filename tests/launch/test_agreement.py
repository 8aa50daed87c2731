"""Ranks that were started with different recipes, or see different data, are told so before anything is written."""

import os
import shutil
from pathlib import Path

import pytest

from launch.agreement import require_same_start
from launch.recipe import load_recipe
from tests.data.small_shards import picture, sample, write_shard, write_source
from tests.launch.tiny import train_here, write_tiny_recipe
from tests.ranks import run_ranks
from vlm.distributed.world import World
from vlm.errors import EveryRankError

ALIKE = ("data.workers=1", "data.root=/elsewhere", "data.cache.limit=3GB")


def begin(recipe: str, overrides: tuple[str, ...], resume: str | None) -> str:
    """The message to rank 1 of two whose overrides and options these are."""
    world = World.current()
    own = world.rank == 1
    try:
        require_same_start(world, load_recipe(recipe, overrides if own else ()), {"--resume": resume if own else None})
    except EveryRankError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("overrides", "resume", "keys"),
    [
        (("seed=3",), None, "seed"),
        (("engine=zero1", "log_every=2 steps"), None, "engine, log_every"),  # free on a resume, but not here
        ((), "auto", "--resume"),
        (ALIKE, None, None),
    ],
)
def test_all_ranks_need_one_recipe(
    tmp_path: Path, overrides: tuple[str, ...], resume: str | None, keys: str | None
) -> None:
    recipe = write_tiny_recipe(tmp_path, tmp_path / "run")
    told = run_ranks(begin, 2, recipe, overrides, resume)
    words = "" if keys is None else f"rank 1 was started with other values than rank 0 of {keys}; all ranks need"
    assert all(one.startswith(words) and bool(one) == bool(words) for one in told)


def train_on_own_data(recipe: str, key: str, places: tuple[str, str]) -> None:
    train_here(recipe, (f"{key}={places[int(os.environ['RANK'])]}",))


def test_all_machines_need_the_same_data(tmp_path: Path) -> None:
    """As many samples, of which one has another caption: each rank would deal out its own global batches."""
    write_source(tmp_path / "first", [17, 5], "train")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    write_shard(tmp_path / "second" / "train-01.tar", [sample(n, jpg=picture(n), txt="other") for n in range(17, 22)])
    recipe = write_tiny_recipe(tmp_path, tmp_path / "run")
    folders = (str(tmp_path / "first"), str(tmp_path / "second"))
    with pytest.raises(EveryRankError, match=r"data\.sources\.pairs: rank 1 sees 22 samples in 2 shards, rank 0"):
        run_ranks(train_on_own_data, 2, recipe, "data.root", folders, group=False)
    evaluate = {"held": {"kind": "retrieval", "shards": "train-*.tar"}}
    recipe = write_tiny_recipe(tmp_path / "first", tmp_path / "run", evaluate=evaluate)
    with pytest.raises(EveryRankError, match=r"evaluate\.held\.shards: rank 1 sees 17 samples in 1 shards, rank 0"):
        run_ranks(train_on_own_data, 2, recipe, "evaluate.held.shards", ("train-*.tar", "train-00.tar"), group=False)
    assert not (tmp_path / "run").exists()
