"""A run whose model has projection heads: any engine, read after and before them, from the recipe and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.main import app
from tests.launch.small import losses_of, metrics_of, recipe_values, write_data, write_recipe
from tests.launch.tiny import train_here, train_ranks
from vlm.errors import UserError

HEAD = {"kind": "mlp", "hidden": 24, "dim": 12}


def changes(folder: Path, run: Path, **more: Any) -> dict[str, Any]:
    model = {**recipe_values(folder, run)["model"], "image_head": HEAD, "text_head": HEAD}
    read = {"kind": "retrieval", "shards": "test-*.tar"}
    evaluate = {"after": read, "before": {**read, "embedding": "before_head"}}
    return {"model": model, "evaluate": evaluate, "duration": "6 steps", **more}


def told(run: Path) -> dict[str, float]:
    return {key: value for line in metrics_of(run) for key, value in line.items() if key.startswith("eval/")}


def figures(model: str, folder: Path, *options: str) -> dict[str, Any]:
    file = folder / "figures.json"
    pattern = str(folder / "test-*.tar")
    result = CliRunner().invoke(app, ["eval", "retrieval", model, "--data", pattern, "--json", str(file), *options])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
def test_heads_train_alike_under_every_kind_of_engine_and_are_read_after_and_before(tmp_path: Path) -> None:
    write_data(tmp_path)
    alone = tmp_path / "alone"
    train_here(str(write_recipe(tmp_path, alone, **changes(tmp_path, alone))))
    for engine in ("zero3", "fsdp"):
        sharded = tmp_path / engine
        train_ranks(2, str(write_recipe(tmp_path, sharded, **changes(tmp_path, sharded, engine=engine))))
        assert losses_of(sharded) == pytest.approx(losses_of(alone), rel=1e-4)
        assert told(sharded).keys() == told(alone).keys()
    for options, name in (((), "after"), (("--before-head",), "before")):
        found = figures(str(alone), tmp_path, *options)
        for key in ("image_to_text_r@5", "text_to_image_median_rank", "num_texts"):
            assert found[key] == told(alone)[f"eval/{name}/{key}"]
    assert told(alone)["eval/after/text_to_image_median_rank"] != told(alone)["eval/before/text_to_image_median_rank"]
    export = ["export", str(alone), str(tmp_path / "out"), "--to", "open_clip"]
    refused = CliRunner().invoke(app, export)
    assert isinstance(refused.exception, UserError)
    assert "--before-head" in str(refused.exception)
    assert CliRunner().invoke(app, [*export, "--before-head"]).exit_code == 0
    exported = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert exported["model_cfg"]["embed_dim"] == 32


def test_a_head_that_fits_nothing_is_one_line_that_names_the_key(tmp_path: Path) -> None:
    write_data(tmp_path)
    model = {**changes(tmp_path, tmp_path / "run")["model"], "text_head": None}
    recipe = write_recipe(tmp_path, tmp_path / "run", model=model)
    with pytest.raises(UserError, match="image_head makes 12 dimensions, text_head 32"):
        train_here(str(recipe))
    wrong = write_recipe(tmp_path, tmp_path / "run", model={**model, "image_head": {"kind": "mpl"}})
    with pytest.raises(UserError, match=r"model\.image_head\.kind: found 'mpl'"):
        train_here(str(wrong))
