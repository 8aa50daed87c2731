"""Recipes: inheritance, overrides, and one clear line for every mistake."""

import json
from pathlib import Path

import pytest
import yaml

from launch.recipe import changed_keys, load_recipe
from vlm.duration import Duration
from vlm.errors import UserError
from vlm.training.optimizers.adamw import AdamW

MINIMAL = """
model: {open_clip: ViT-B-32}
data: {sources: {photos: {shards: "photos-{000..003}.tar"}}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def test_what_is_not_said_has_its_default(recipe: Path) -> None:
    loaded = load_recipe(str(recipe))
    assert loaded.run == "runs/mine"
    assert loaded.engine == "ddp"
    assert set(loaded.objective) == {"clip"}


def test_overrides_replace_values_at_their_path(recipe: Path) -> None:
    loaded = load_recipe(
        str(recipe),
        ["optimizer.lr=3e-4", "duration=1.2M samples", "engine=zero2", "objective.clip.weight=0.5", "data.root=/x=y"],
    )
    assert loaded.optimizer.lr == 3e-4
    assert loaded.duration == Duration(1.2e6, "samples")
    assert loaded.engine == "zero2"
    assert loaded.objective["clip"].weight == 0.5
    assert loaded.data.root == "/x=y"


def test_a_base_is_inherited_and_overridden_key_by_key(recipe: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: mine.yaml\noptimizer: {lr: 0.5}\nmodel: {open_clip: RN50, freeze_batch_norm: true}\n")
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("base: child.yaml\noptimizer: {beta2: 0.95}\n")
    loaded = load_recipe(str(grandchild))
    assert loaded.optimizer == AdamW(lr=0.5, beta2=0.95)
    assert loaded.model.open_clip == "RN50"
    assert "photos" in loaded.data.sources


def test_the_resolved_recipe_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(str(recipe), ["ema.decay=0.99", "log_every=7 steps"])
    again = tmp_path / "resolved.yaml"
    again.write_text(yaml.safe_dump(loaded.model_dump(mode="json")))
    assert load_recipe(str(again)) == loaded


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lerning_rate=1", "optimizer.lerning_rate: unknown key (value 1); "),
        ("glbal_batch=1", "glbal_batch: unknown key (value 1); nearest: global_batch"),
        ("global_batch=many", "global_batch: found 'many'; "),
        ("global_batch=0", "global_batch: found 0; "),
        ("engine=zero4", "engine: there is no engine 'zero4'; nearest: zero3, zero2, zero1, or name your own"),
        ("duration=40", "duration: a duration names its unit"),
        ("duration=0 steps", "duration: must be longer than zero, found 0 steps"),
        ("objective={clipp: 1}", "there is no objective 'clipp'; nearest: clip"),
        ("objective.clip.wieght=1", "clip.wieght: unknown key (value 1); nearest: weight"),
        ("objective.clip=0", "an objective needs at least one term"),
        ("evaluate={r: {kind: retreival, shards: a.tar}}", "evaluate.r"),
        (
            "evaluate={r: {kind: retrieval, shards: a.tar, evry: 3 steps}}",
            "evaluate.r.evry: unknown key (value '3 steps'); nearest: every",
        ),
        ("data.sources.photos.wait=2", "data.sources.photos.wait: unknown key (value 2)"),
        ("model.open_clip=null", "exactly one of open_clip, architecture, transformers, towers is needed; found none"),
        ("data.sources.photos.weight=-1", "data.sources.photos.weight: found -1; "),
        ("noequals", "override 'noequals': write key.path=value"),
        ("data.caption=[", "'[' is no YAML value"),
    ],
)
def test_a_mistake_is_one_line_with_path_value_and_nearest_name(recipe: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe), [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_names_the_nearest_that_ships() -> None:
    with pytest.raises(UserError, match=r"recipe flikr8k-tiny: no such file, .* nearest: flickr8k-tiny"):
        load_recipe("flikr8k-tiny")


def test_what_is_no_mapping_or_no_yaml_or_a_circle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text, words in [
        ("- a\n", "found list"),
        ("a: [\n", "not readable as YAML"),
        ("base: bad.yaml\n", "leads back to itself"),
        ("base: missing.yaml\n", "no such file"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            load_recipe(str(path))


def test_required_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"empty.yaml: model: this key is required"):
        load_recipe(str(path))


def test_changed_keys_are_listed_but_not_those_that_change_nothing(recipe: Path) -> None:
    before = load_recipe(str(recipe)).model_dump(mode="json")
    after = load_recipe(
        str(recipe), ["optimizer.lr=0.1", "engine=zero3", "data.workers=5", "seed=4", "evaluate={}", "run=x"]
    ).model_dump(mode="json")
    assert changed_keys(before, after) == ["optimizer.lr", "seed"]


def test_the_schema_knows_every_key(recipe: Path) -> None:
    from launch.recipe import Recipe

    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "clip" in json.dumps(schema["properties"]["objective"])


@pytest.mark.parametrize("key", ["evaluate", "data.sources"])
@pytest.mark.parametrize("name", ["../checkpoints", "a/b", "..", "", "/abs", ".hidden", "x" * 300])
def test_a_name_that_would_be_another_path_is_refused_where_the_recipe_is_read(
    tmp_path: Path, key: str, name: str
) -> None:
    one = {"data.sources": {"shards": "x.tar"}, "evaluate": {"kind": "retrieval", "shards": "x.tar"}}
    values = {
        "model": {"open_clip": "ViT-B-32"},
        "data": {"sources": {"a": one["data.sources"]}},
        "duration": "1 steps",
    }
    holder = values if key == "evaluate" else values["data"]
    holder[key.rpartition(".")[2]] = {"good": one[key], name: one[key]}  # type: ignore[index]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=rf"recipe\.yaml: {key}: the name .* may become a file name"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_a_run_in_a_store_is_told_what_to_write(recipe: Path) -> None:
    said = (
        r"run: 's3://bucket/run' is no local path but an address \(s3\); write a folder .*, and sync: 's3://bucket/run'"
    )
    with pytest.raises(UserError, match=said):
        load_recipe(str(recipe), ["run=s3://bucket/run"])
    assert load_recipe(str(recipe), ["run=/a", "sync=s3://bucket/run"]).sync == "s3://bucket/run"
