"""A start says at once what it does, and no command imports what it does not need."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from launch.first_line import first_line
from tests.eval.runs import logged, write_run
from tests.launch.tiny import tiny_values, write_tiny, write_tiny_recipe
from vlm.model.image_spec import ImageSpec

# Prints the heavy modules that are there after each command, and says on the way when torch comes.
PROGRAM = """
import json, sys
from launch.main import app

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch is imported", flush=True)

sys.meta_path.insert(0, Torch())
heavy = json.loads(sys.argv[1])
for command in json.loads(sys.argv[2]):
    if command:
        app(command, prog_name="vlm", standalone_mode=False)
    print("LOADED", json.dumps([name for name in heavy if name in sys.modules]), flush=True)
"""
HEAVY = [
    *("torch", "pydantic", "numpy", "matplotlib", "scipy", "sklearn", "polars", "timm", "torchvision", "open_clip"),
    *("transformers", "transformers.modeling_utils", "accelerate", "deepspeed", "wandb", "tensorboard", "webdataset"),
]


def run_commands(*commands: list[str]) -> list[str]:
    """What one process prints that does these commands one after the other."""
    arguments = [sys.executable, "-P", "-c", PROGRAM, json.dumps(HEAVY), json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_each_command_imports_what_it_needs_and_a_start_is_told_before_torch_is(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    shards = [str(path) for path in sorted(tmp_path.glob("train-*.tar"))]
    FolderIndex(ShardCache(), "shards").load_or_build(shards)
    measured = write_run(tmp_path / "measured", [logged(1, 2.0)])
    recipe = write_tiny_recipe(tmp_path, tmp_path / "run", duration="1 steps", data={"max_bad_share": 1})
    said = run_commands(
        [],
        ["data", "index", str(tmp_path / "train-*.tar")],
        ["report", str(measured)],
        ["train", recipe],
    )
    nothing, index, report, train = (
        set(json.loads(line.removeprefix("LOADED "))) for line in said if line.startswith("LOADED ")
    )
    assert nothing == set()
    assert index == {"pydantic", "numpy"}
    assert report == {"pydantic", "numpy", "matplotlib"}
    assert train == report | {
        "torch",
        "timm",
        "torchvision",
        "open_clip",
        "transformers",
        "accelerate",
        "webdataset",
    }
    first = next(place for place, line in enumerate(said) if line.startswith("vlm train "))
    assert said[first] == (
        f"vlm train {recipe}: model ViT + transformer on 1 rank (CPU), engine ddp, precision fp32; 51 samples, 1 steps "
        "of 12; loading torch and the model"
    )
    assert said[first + 1] == "torch is imported"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"duration": "2 epochs"}, "12 samples a step"),
        ({"duration": "120 samples"}, "10 steps of 12"),
        ({"data": {"mode": "sequential"}}, "12 steps of 12"),
        ({"data": {"root": None, "sources": {"pairs": {"shards": "s3://bucket/a.tar"}}}}, "12 steps of 12"),
        ({"duration": 7}, "12 samples a step"),
    ],
)
def test_what_no_index_tells_is_left_out(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    """Without an index, of a stream, far away, or where the recipe is wrong, which is told later."""
    values = tiny_values(tmp_path, tmp_path / "run", **changes)
    assert f"; {told}; loading" in first_line("mine", values)


def test_a_model_is_named_as_the_recipe_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    values = tiny_values(tmp_path, tmp_path / "run")
    for model, name in (({"open_clip": "ViT-B-32"}, "model ViT-B-32"), ({"towers": {}}, "a model of two towers")):
        assert f"mine: {name} on 8 ranks (" in first_line("mine", {**values, "model": model})


def test_images_have_the_mean_and_the_deviation_of_open_clip() -> None:
    assert (ImageSpec().mean, ImageSpec().std) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
