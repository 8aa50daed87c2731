"""A run that streams its shards: it trains, resumes without exactness, and its resolved recipe fixes the lanes."""

from pathlib import Path

import yaml

from launch.recipe import load_recipe
from launch.train import train
from tests.launch.small import losses_of, write_data, write_recipe


def test_a_run_without_an_index_trains_and_resumes(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    sources = {"pairs": {"shards": "train-*.tar", "num_samples": 60}}
    data = {"root": str(tmp_path / "data"), "mode": "sequential", "workers": 0, "sources": sources}
    changes = {"duration": "8 steps", "checkpoint_every": "4 steps", "evaluate": {}}
    recipe = load_recipe(str(write_recipe(tmp_path / "data", tmp_path / "run", data=data, **changes)))
    run = train(recipe)
    assert len(losses_of(run)) == 8
    train(recipe, resume=str(run / "checkpoints" / "step-00000004"))
    assert len(losses_of(run)) == 8
    assert not list((tmp_path / "data").glob("*.idx"))
    assert yaml.safe_load((run / "recipe.yaml").read_text())["data"]["lanes"] == 12
