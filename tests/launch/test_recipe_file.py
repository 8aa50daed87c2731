"""Recipe files: nothing in them is lost in silence, and none takes long or ends in a traceback."""

import string
from pathlib import Path

import pytest

from launch.recipe_file import RECIPES, read_recipe, shipped_recipes
from vlm.errors import UserError
from vlm.yaml_text import parse_yaml


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read_recipe(str(path), overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
LADDER = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\ndata:\n  root: x\nseed: 2\n", "line 4: the key 'seed' comes twice (before in line 1)"),
        ("data: {sources: {a: 1,\n a: 2}}\n", "line 2: the key 'a' comes twice (before in line 1)"),
        ("data: &d {root: x}\nmore: {<<: *d, root: y, root: z}\n", "line 2: the key 'root' comes twice"),
        ("a: " + "[" * 5000 + "]" * 5000, "line 1: nested more than 40 deep"),
        ("".join(" " * n + "a:\n" for n in range(1000)), "nested more than 40 deep"),
        (LAUGHS, "more than 100,000 values, aliases followed"),
        (LADDER, "nested more than 40 deep"),
        ("a: &a [*a]\n", "line 1: an alias to what it lies in"),
        ("on: 1\n", "line 1: the key 'on' is no text; quote it"),
        ("? [a, b]\n: 1\n", "is no text"),
        ("seed: " + "9" * 5000, "line 1: Exceeds the limit"),
        ("a: 2024-13-45\n", "line 1: month must be in 1..12"),
        ("a: !!python/object/apply:os.system [true]\n", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: \x1b[31m\n", "special characters are not allowed"),
        ("base: [a]\n", "base: found ['a']"),
        ("base: " + "x" * 5000 + "\n", "no such file"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert words in refused(path)


def test_long_chains_of_bases_and_long_files_are_refused(tmp_path: Path) -> None:
    for number in range(1500):
        (tmp_path / f"r{number}.yaml").write_text(f"base: r{number + 1}.yaml\n")
    assert "a chain of more than 20 bases" in refused(tmp_path / "r0.yaml")
    (tmp_path / "long.yaml").write_bytes(b"# \n" * 400_000)
    assert "1,200,000 bytes are no recipe" in refused(tmp_path / "long.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (".".join("a" * 5000) + "=1", "nested more than 40 deep"),
        ("a=" + "[" * 5000, "nested more than 40 deep"),
        ("a={b: 1, b: 2}", "the key 'b' comes twice"),
        ("alarm.2.metric=loss", "'2' is no position in a list of 1"),
        ("alarm.\N{SUPERSCRIPT TWO}=loss", "is no position"),
    ],
)
def test_an_override_that_is_none_is_one_line(tmp_path: Path, override: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("alarm: [{metric: loss}]\n")
    line = refused(path, override)
    assert words in line
    assert len(line) < 700


def test_an_override_changes_one_place_though_an_alias_ties_two(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {sources: {a: &s {shards: x.tar, weight: 1}, b: *s}}\n")
    sources = read_recipe(str(path), ["data.sources.a.weight=3"]).values["data"]["sources"]
    assert sources == {"a": {"shards": "x.tar", "weight": 3}, "b": {"shards": "x.tar", "weight": 1}}


def test_an_override_steps_into_a_list_whatever_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("alarm: [loss]\n")
    assert read_recipe(str(path), ["alarm.0.metric=loss"]).values["alarm"] == [{"metric": "loss"}]


def test_null_takes_away_what_a_base_has_by_name(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "evaluate: {a: {kind: retrieval}, b: {kind: zeroshot}}\n"
        "data: {root: x, sources: {p: {shards: p.tar}, q: {shards: q.tar}}}\n"
        "objective: {clip: 1, sigmoid: 1}\n"
        "providers: {queue: {size: 8}, mixed_negatives: }\n"
    )
    path = tmp_path / "mine.yaml"
    path.write_text("base: base.yaml\nevaluate: {a: null}\ndata: {root: null, sources: {q: }}\nobjective: {clip: ~}\n")
    values = read_recipe(str(path), ["providers.queue=null"]).values
    assert values["evaluate"] == {"b": {"kind": "zeroshot"}}
    assert values["data"] == {"root": None, "sources": {"p": {"shards": "p.tar"}}}  # a key's null is its value
    assert values["objective"] == {"sigmoid": 1}
    assert values["providers"] == {"mixed_negatives": None}  # nothing inherited: the provider with its defaults


def test_plain_yaml_reads_as_everywhere() -> None:
    text = "a: [1, 2.5, yes, ~, 'x', 2024-01-31]\nb: &b {c: 1}\nd: {<<: *b, e: 2}\n"
    import datetime

    assert parse_yaml(text) == {
        "a": [1, 2.5, True, None, "x", datetime.date(2024, 1, 31)],
        "b": {"c": 1},
        "d": {"c": 1, "e": 2},
    }
    assert parse_yaml("{a: 1:30, b: 1:30.5, c: 1_000, d: 1.5e-3}") == {
        "a": "1:30",
        "b": "1:30.5",
        "c": 1000,
        "d": 0.0015,
    }


def test_every_recipe_that_ships_is_listed_with_what_it_is_for() -> None:
    listed = shipped_recipes()
    assert set(listed) == {path.stem for path in RECIPES.glob("*.yaml")}
    assert all(words[0] in string.ascii_uppercase and words.endswith(".") for words in listed.values())
