"""The stored schema is that of the recipe, and what it finds before torch is imported is what is found after."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.quick_check import SCHEMA, quick_problem
from launch.recipe import Recipe, check_recipe
from launch.recipe_file import read_recipe, shipped_recipes
from tests.launch.test_recipe_keys import MODEL
from vlm.errors import UserError
from vlm.yaml_text import parse_yaml

MINIMAL = f"model: {json.dumps(MODEL)}\ndata: {{sources: {{photos: {{shards: photos.tar}}}}}}\n"


def test_the_stored_schema_is_that_of_the_recipe() -> None:
    assert json.loads(SCHEMA.read_text()) == Recipe.model_json_schema(), "vlm schema > launch/recipe_schema.json"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lerning_rate=1", "optimizer.lerning_rate: unknown key (value 1); "),
        ("glbal_batch=1", "glbal_batch: unknown key (value 1); nearest: global_batch"),
        ("global_batch=many", "global_batch: found 'many'; input should be a valid integer"),
        ("global_batch=0", "global_batch: found 0; input should be greater than 0"),
        ("global_batch=true", "global_batch: found True; input should be a number, not true or false"),
        ("global_batch=2.5", "global_batch: found 2.5; input should be a valid integer"),
        ("optimizer.lr=1e400", "optimizer.lr: found '1e400'; input should be a finite number"),
        ("optimizer.beta1=1", "optimizer.beta1: found 1; input should be less than 1"),
        ("engine=zero4", "engine: found 'zero4'; input should be 'ddp', 'fsdp', 'zero1', 'zero2' or 'zero3'"),
        ("objective.clip.wieght=1", "clip.wieght: unknown key (value 1); nearest: weight"),
        ("objective.clippp=1", "objective.clippp: unknown key (value 1); nearest: clip"),
        ("objective.clip=-1", "objective.clip: found -1; input should be greater than or equal to 0"),
        ("evaluate={r: {kind: retrieval, shards: a.tar, evry: 3 steps}}", "evaluate.r.evry: unknown key"),
        ("data.sources.photos.weight=-1", "data.sources.photos.weight: found -1; "),
        (
            "data.augment.crop_scale=[0, 2]",
            "data.augment.crop_scale.1: found 2; input should be less",
        ),
        ("model.image_std=[0.2, 0.2, -0.2]", "model.image_std.2: found -0.2"),
        ("model.image_head={kind: mlp, dimm: 3}", "model.image_head.dimm: unknown key (value 3); nearest: dim"),
        ("ema=5", "ema: found 5; input should be a mapping"),
    ],
)
def test_mistakes_are_seen_at_once_and_are_mistakes(override: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    written = read_recipe(str(path), [override])
    said = quick_problem(written.values)
    assert said is not None
    assert words in said
    with pytest.raises(UserError):
        check_recipe(written.values, "recipe")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "objective: gap-cua",
        "objective: {clip: 1, 'my.terms:Pull': {weight: 2, other: [1]}}",
        "objective: {near: {kind: clip, between: [image, region]}}",
        "providers: {queue: }",
        "{global_batch: '64', optimizer: {lr: '1e-3'}, ema: null, max_grad_norm: null}",
        "data: {caption: first, sources: {a: {shards: [a.tar, b.tar]}}, cache: {limit: 5 GB}, workers: 0}",
        "{duration: 1e3 steps, log_every: 2k samples, checkpoint_every: 0.5 epochs}",
        "evaluate: {z: {kind: zeroshot, shards: a.tar, classes: [a, b], shifts: [0, 1.5]}}",
        "alarm: [{metric: loss, rises_by: 1, over: 3 steps, along_with: {metric: lr, falls_by: 2}}]",
    ],
)
def test_what_can_be_meant_is_passed_on(text: str) -> None:
    values = {**parse_yaml(MINIMAL), "run": "x", **parse_yaml(text)}
    assert quick_problem(values) is None
    if "my.terms" not in text:
        check_recipe(values, "recipe")


def test_shipped_recipes_are_passed_on_and_missing_keys_are_told() -> None:
    for name in shipped_recipes():
        assert quick_problem(read_recipe(name).values) is None
    assert quick_problem({"run": "x", "seed": 1}) == "model: this key is required"


def test_a_mistake_is_told_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(MINIMAL), "glbal_batch": 3}))
    program = (
        "import sys; sys.argv[1:] = ['train', sys.argv[1]]\n"
        "from launch.main import run\n"
        "try: run()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=SCHEMA.parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 False False\n"
    assert "glbal_batch: unknown key (value 3); nearest: global_batch" in done.stderr
