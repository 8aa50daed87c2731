"""Every key of a recipe says what it is for, and every number has its bounds."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import yaml

from data.check.report import CheckConfig
from data.filter.rules import AlignRules
from launch.recipe import Recipe, check_recipe, load_recipe
from vlm.errors import UserError
from vlm.model.config import ModelConfig

_LEAST, _MOST = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}


def objects(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with named keys in a schema, terms and providers included, with its title."""
    if "properties" in schema:
        yield schema.get("title", "?"), schema
    for inner in schema.values():
        for part in inner if isinstance(inner, list) else [inner]:
            if isinstance(part, dict):
                yield from objects(part)


def unbounded(schema: Any, name: str = "") -> Iterator[str]:
    """The places of numbers that lack a least or a greatest value."""
    if not isinstance(schema, dict):
        return
    if schema.get("type") in ("integer", "number") and not (_LEAST & schema.keys() and _MOST & schema.keys()):
        yield name
    for key, inner in schema.items():
        for part in inner if isinstance(inner, list) else [inner]:
            yield from unbounded(part, f"{name}.{key}")


SCHEMAS = [config.model_json_schema() for config in (Recipe, CheckConfig, AlignRules)]


def test_every_key_has_a_description() -> None:
    found = [pair for schema in SCHEMAS for pair in objects(schema)]
    assert len({title for title, _ in found}) > 40
    keys = {
        (title, key): field for title, schema in found for key, field in schema["properties"].items() if title != "?"
    }
    assert len(keys) > 170
    assert [key for key, field in keys.items() if not field.get("description")] == []


def test_every_number_has_a_least_and_a_greatest_value() -> None:
    assert [place for schema in SCHEMAS for place in unbounded(schema)] == []


MODEL = {
    "architecture": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, "data": {"sources": {"photos": {"shards": "photos.tar"}}}}))
    return str(path)


VISION, TEXT = "model.architecture.vision_cfg", "model.architecture.text_cfg"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("global_batch=true", "global_batch", "True"),
        ("data.augment.crop_scale=[true, 1]", "data.augment.crop_scale.0", "True"),
        ("data.caption.fields={txt: yes}", "data.caption.fields.txt", "True"),
        ("objective.clip=true", "clip", "True"),
        ("objective.clip=-1", "clip.weight", "-1"),
        ("optimizer.lr=1e400", "optimizer.lr", "'1e400'"),
        ("optimizer.lr=1.0e+400", "optimizer.lr", "inf"),
        ("optimizer.lr=.nan", "optimizer.lr", "nan"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay", "-1"),
        ("duration=1e30 steps", "duration", "1e30 steps"),
        ("duration=1e400 epochs", "duration", "1e400 epochs"),
        ("schedule.warmup=1e30 samples", "schedule.warmup", "1e30 samples"),
        ("global_batch=100000000", "global_batch", "100000000"),
        ("data.workers=100000", "data.workers", "100000"),
        ("providers.queue.size=10000000000000", "queue.size", "10000000000000"),
        ("objective={clustered_negatives: {clusters: [0]}}", "clustered_negatives.clusters.0", "0"),
        ("model.image_size=0", "model.image_size", "0"),
        ("model.image_size=7", "model.image_size", "7"),
        ("model.image_std=[0.2, 0.2, -0.2]", "model.image_std.2", "-0.2"),
        ("model.image_mean=[123.7, 116.3, 103.5]", "model.image_mean.0", "123.7"),
        (f"{VISION}.image_size=0", "vision_cfg: image_size", "0"),
        (f"{VISION}.image_size=7", "vision_cfg: image_size", "7"),
        (f"{VISION}.patch_size=64", "vision_cfg: patch_size", "64"),
        (f"{VISION}.layers=-1", "vision_cfg: layers", "-1"),
        (f"{VISION}.layers=true", "vision_cfg: layers", "True"),
        (f"{VISION}.head_width=0", "vision_cfg: head_width", "0"),
        (f"{TEXT}.context_length=0", "text_cfg: context_length", "0"),
        (f"{TEXT}.layers=-1", "text_cfg: layers", "-1"),
        (f"{TEXT}.heads=0", "text_cfg: heads", "0"),
        (f"{TEXT}.mlp_ratio=0", "text_cfg: mlp_ratio", "0"),
        ("seed=" + "9" * 4000, "seed", "9"),
        ("a.b.c.d=[[[[1]]]]", "a: unknown key", "{'b'"),
        ('"a\\nb"=1', "unknown key", "1"),
        ("run=5", "run", "5"),
        ("data.cache.limit=1e30 TB", "data.cache.limit", ""),
    ],
)
def test_nonsense_is_one_line_with_path_and_value(recipe: str, override: str, path: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, [override])
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 500
    assert path in line
    assert value in line


def test_every_architecture_that_open_clip_knows_is_within_the_bounds() -> None:
    for name in open_clip.list_models():
        ModelConfig.model_validate({"architecture": open_clip.get_model_config(name)})


ODD: list[Any] = [
    True,
    10**5000,
    float("nan"),
    "9" * 400,
    "a\x00\x1b[31m",
    "\ud800",
    [[]],
    {},
    {"kind": {}},
    {"a": [1]},
]


def dotted(schema: dict[str, Any]) -> list[tuple[str, ...]]:
    """The paths of all keys of a recipe, down to options of terms and parts that a recipe may lack."""
    found: set[tuple[str, ...]] = set()

    def walk(part: dict[str, Any], path: tuple[str, ...]) -> None:
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        for name, inner in part.get("properties", {}).items():
            if (*path, name) not in found and len(path) < 5:
                found.add((*path, name))
                walk(inner, (*path, name))
        for inner in (*part.get("anyOf", ()), *part.get("oneOf", ()), *part.get("patternProperties", {}).values()):
            walk(inner, path if "properties" in inner or "anyOf" in part else (*path, "named"))

    walk(schema, ())
    return sorted(found)


def test_no_value_of_any_key_ends_in_anything_but_one_line() -> None:
    paths = dotted(Recipe.model_json_schema())
    assert len(paths) > 200
    refused = 0
    for path in paths:
        for value in ODD:
            values: dict[str, Any] = {"run": "x", "model": MODEL, "data": {"sources": {"named": {"shards": "a.tar"}}}}
            values = copy.deepcopy(values)
            place = values
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = value
            try:
                check_recipe(values, "recipe")
                line = ""
            except UserError as error:
                line = str(error)
            refused += bool(line)
            assert "\n" not in line, (path, value)
    assert refused > 6 * len(paths)
