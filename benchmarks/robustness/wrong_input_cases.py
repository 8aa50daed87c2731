"""Wrong inputs for all commands, drawn by kind from a seed; one function a kind, each giving a command line."""

import json
import random
import shutil
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from launch.recipe import Recipe
from tests.data.small_shards import picture, sample, write_shard
from tests.launch.small import recipe_values, write_data

NUMBERS = ["-1", "0", "true", "1e400", ".nan", "-.inf", "1e30", "99999999999999999999", "[]", "{}", "null", "''", "0.5"]
WORDS = [
    "x",
    "a/b",
    "../up",
    "'\\0'",
    '"\\e[31m"',
    "ddpp",
    "é" * 300,
    "[a, b]",
    "{a: 1}",
    "5 stepz",
    "1e30 steps",
    "s3://b/x",
]
OPTIONS = ["--data", "--json", "--plots", "--classes", "--limit", "--batch-size", "--precision", "--shift", "--workers"]


@dataclass(frozen=True)
class Case:
    """One command line, what to make before it, and where it might write."""

    kind: str
    words: list[str]
    out: Path


@dataclass(frozen=True)
class Fixtures:
    """Undamaged shards, a recipe, a run and tables, of which each kind of case damages a copy."""

    folder: Path

    @property
    def data(self) -> Path:
        """Training and held-out shards."""
        return self.folder / "data"

    @property
    def run(self) -> Path:
        """A finished run."""
        return self.folder / "run"

    def values(self, run: Path) -> dict[str, Any]:
        """A recipe of one step."""
        return {**recipe_values(self.data, run), "duration": "1 step", "evaluate": {}}

    def make(self) -> None:
        """Write what is not there yet."""
        if not self.data.exists():
            write_data(self.data)
        if not self.run.exists():
            from launch.recipe import check_recipe
            from launch.train import train

            evaluation = {"kind": "retrieval", "shards": "test-*.tar"}
            train(check_recipe({**self.values(self.run), "evaluate": {"r": evaluation}}, "fixtures"))


def cases(count: int, seed: int, fixtures: Fixtures, work: Path) -> Iterator[Callable[[], Case]]:
    """`count` makers of cases; each writes its files when it is called, and needs no other to have been."""
    kinds = [recipe_text, override, override, wrong_option, damaged_shard, damaged_run, wrong_name, wrong_table]
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        yield partial(kinds[number % len(kinds)], draw, fixtures, work / f"{number:04d}")


def recipe_text(draw: random.Random, fixtures: Fixtures, folder: Path) -> Case:
    """A recipe file that is no YAML, or whose text was changed somewhere."""
    folder.mkdir(parents=True)
    text = yaml.safe_dump(fixtures.values(folder / "out"))
    lines = text.splitlines()
    where = draw.randrange(len(lines))
    changes: list[Callable[[], str]] = [
        lambda: "\n".join([*lines[:where], lines[where], *lines[where:]]),
        lambda: text[: draw.randrange(len(text))] + draw.choice("[{:&*!%@`\t\0"),
        lambda: "".join(draw.choice(string.printable) for _ in range(draw.randrange(1, 400))),
        lambda: text.replace(":", draw.choice([": [", ": {", ":", " :- "]), draw.randrange(1, 5)),
        lambda: f"base: {draw.choice(['missing', 'mine.yaml', '[1]', '/', '..', 'x' * 300])}\n{text}",
        lambda: text + f"extra_{draw.randrange(99)}: {draw.choice(NUMBERS + WORDS)}\n",
        lambda: "a: " + draw.choice("[{") * draw.randrange(10, 9000),
        lambda: f"{draw.choice(['- ', '? ', '!!python/name:os.system ', '--- ', '&a *a'])}{text}",
    ]
    path = folder / "mine.yaml"
    content = draw.choice(changes)().encode("utf-8", "replace")
    path.write_bytes(draw.choice([content, content, content + b"\xff\xfe", content.replace(b"\n", b"\r")]))
    return Case("recipe text", ["train", str(path)], folder / "out")


def override(draw: random.Random, fixtures: Fixtures, folder: Path) -> Case:
    """A key of the recipe with a value that can hardly be meant."""
    folder.mkdir(parents=True)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(fixtures.values(folder / "out")))
    key = draw.choice(_keys())
    value = draw.choice(NUMBERS + WORDS)
    if draw.random() < 0.15:
        key = _misspelt(draw, key)
    command = draw.choice(["train", "train", "train", "verify-gradients"])
    return Case("override", [command, str(path), f"{key}={value}"], folder / "out")


def wrong_option(draw: random.Random, fixtures: Fixtures, folder: Path) -> Case:
    """Options that are unknown, lack a value, or have an impossible one."""
    folder.mkdir(parents=True)
    good = {
        "eval retrieval": [str(fixtures.run), "--data", str(fixtures.data / "test-0.tar")],
        "eval zeroshot": [str(fixtures.run), "--data", str(fixtures.data / "test-0.tar"), "--classes", "c.json"],
        "eval geometry": [str(fixtures.run), "--data", str(fixtures.data / "test-0.tar")],
        "data check": [str(fixtures.data / "test-0.tar")],
        "data filter": [str(fixtures.data / "test-0.tar"), "--out", str(folder / "out")],
        "data scenes": [str(folder / "out"), "--train", "2", "--val", "2"],
        "export": [str(fixtures.run), str(folder / "out"), "--to", "open_clip"],
        "report": [str(fixtures.run), "--out", str(folder / "out")],
    }
    command = draw.choice(sorted(good))
    words = good[command]
    wrong = [draw.choice(OPTIONS), draw.choice(["-1", "x", "", "1e400", "/dev/null/x", "nan", "../\0", "0", "é"])]
    changed = draw.choice([[*words, *wrong], [*words, wrong[0]], words[1:], [*words, "extra"], [*words[:-1], wrong[1]]])
    return Case("options", [*command.split(), *(word.replace("\0", "") for word in changed)], folder / "out")


def damaged_shard(draw: random.Random, fixtures: Fixtures, folder: Path) -> Case:
    """A shard that was cut, changed, replaced or filled with something else."""
    folder.mkdir(parents=True)
    shard = folder / "test-0.tar"
    content = bytearray((fixtures.data / "test-0.tar").read_bytes())
    for change in draw.sample(range(4), draw.randrange(1, 3)):
        if change == 0:
            del content[draw.randrange(len(content)) :]
        elif change == 1:
            for _ in range(draw.randrange(1, 60)):
                if content:
                    content[draw.randrange(len(content))] = draw.randrange(256)
        elif change == 2:
            content = bytearray(draw.randbytes(draw.randrange(0, 3000)))
        else:
            start = draw.randrange(len(content) + 1)
            content[start : start + draw.randrange(4000)] = bytes(draw.randrange(4000))
    shard.write_bytes(bytes(content))
    (folder / "classes.json").write_text(draw.choice(['["a"]', "[", "{}", "[1, 2]", '["a", "a"]', '"x"', "null"]))
    recipe = folder / "mine.yaml"
    values = fixtures.values(folder / "out")
    values["data"] = {"root": str(folder), "sources": {"s": {"shards": "test-0.tar"}}, "workers": 0}
    recipe.write_text(yaml.safe_dump(values))
    lines = [
        ["train", str(recipe)],
        ["train", str(recipe), "data.mode=sequential", "data.sources.s.num_samples=30"],
        ["eval", "retrieval", str(fixtures.run), "--data", str(shard)],
        ["eval", "zeroshot", str(fixtures.run), "--data", str(shard), "--classes", str(folder / "classes.json")],
        ["data", "check", str(shard), "--workers", "1"],
        ["data", "index", str(shard), "--workers", "1"],
        ["data", "filter", str(shard), "--out", str(folder / "out"), "--workers", "1"],
    ]
    return Case("shards", draw.choice(lines), folder / "out")


def damaged_run(draw: random.Random, fixtures: Fixtures, folder: Path) -> Case:
    """A run one of whose files was cut, changed, emptied or replaced."""
    run = folder / "run"
    shutil.copytree(fixtures.run, run)
    file = draw.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    change = draw.randrange(5)
    if change == 0:
        file.unlink()
    elif change == 1:
        file.write_bytes(bytes(content[: draw.randrange(len(content) + 1)]))
    elif change == 2 and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(content))
    elif change == 3:
        file.write_text(draw.choice(["{}", "[]", "null", "\0", '{"a": ' * 5000, "9" * 5000]))
    else:
        file.unlink()
        file.mkdir()
    recipe = folder / "mine.yaml"
    recipe.write_text(yaml.safe_dump({**fixtures.values(run), "duration": "2 steps"}))
    data = str(fixtures.data / "test-0.tar")
    lines = [
        ["train", str(recipe), "--resume", "auto", "--allow-changes"],
        ["eval", "retrieval", str(run), "--data", data],
        ["report", str(run), "--out", str(folder / "out")],
        ["export", str(run), str(folder / "out"), "--to", "open_clip"],
        ["train", str(run / "recipe.yaml"), f"run={folder / 'out'}"],
    ]
    return Case("runs", draw.choice(lines), folder / "out")


def wrong_name(draw: random.Random, fixtures: Fixtures, folder: Path) -> Case:
    """Names of models, shards, folders and formats that name nothing, or something else."""
    folder.mkdir(parents=True)
    name = draw.choice(
        ["nowhere", "", "/", "/dev/null", "ViT-B-23", "ViT-B-32:nope", ":", "a" * 5000, "~nobody/x", "s3:/x", "http://",
         "https://127.0.0.1:9/x.tar", "{000000..99999999999}.tar", "[", "*", "{a,", "pipe:false", "é\n", "-", "."]
    )  # fmt: skip
    data = str(fixtures.data / "test-0.tar")
    lines = [
        ["eval", "retrieval", name, "--data", data],
        ["eval", "retrieval", str(fixtures.run), "--data", name],
        ["eval", "zeroshot", str(fixtures.run), "--data", data, "--classes", name],
        ["eval", "retrieval", str(fixtures.run), "--data", data, "--json", name],
        ["export", name, str(folder / "out"), "--to", "open_clip"],
        ["export", str(fixtures.run), str(folder / "out"), "--to", name],
        ["report", name, "--out", str(folder / "out")],
        ["train", name],
        ["train", "scenes", f"data.root={name}", f"run={folder / 'out'}"],
        ["data", "index", name],
        ["data", "check", name],
        ["data", "build", name, str(folder / "out")],
        ["data", "filter", data, "--out", str(folder / "out"), "--exclude", name],
        ["recipes", name],
    ]
    return Case("names", draw.choice(lines), folder / "out")


def wrong_table(draw: random.Random, fixtures: Fixtures, folder: Path) -> Case:
    """Tables and shards of samples that training could not use."""
    del fixtures
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(1))
    rows = [("a.png", "a cat"), (draw.choice(["b.png", "../a.png", "/etc/passwd", "", "\0", "http://x/y"]), "a dog")]
    kind = draw.choice(["csv", "tsv", "jsonl", "json", "parquet", "tar", "txt"])
    table = folder / f"t.{kind}"
    if kind == "tar":
        write_shard(table, [sample(n, jpg=draw.choice([b"", picture(n)[:60]]), txt="x") for n in range(5)])
        return Case("tables", ["data", "check", str(table), "--max-bad-share", "0", "--workers", "1"], folder / "out")
    if kind == "jsonl":
        text = "\n".join(json.dumps({"image": image, "caption": words}) for image, words in rows)
    else:
        text = "\n".join((",", "\t")[kind == "tsv"].join(row) for row in [("image", "caption"), *rows])
    cut = draw.randrange(len(text))
    text = draw.choice([text[:cut], text[:cut] + '"' + text[cut:], text[:cut] + "\0\xff" + text[cut:], "", text[::-1]])
    table.write_text(text, errors="replace")
    extra = draw.choice([[], ["--image-column", "x"], ["--caption-column", "y"], ["--label-column", "caption"]])
    return Case("tables", ["data", "build", str(table), str(folder / "out"), "--workers", "1", *extra], folder / "out")


def _keys() -> list[str]:
    """The dotted keys of a recipe, those of parts that a recipe may lack included."""
    schema = Recipe.model_json_schema()
    found: list[str] = []

    def walk(part: dict[str, Any], path: str, depth: int) -> None:
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rsplit("/", 1)[1]]
        for name, inner in part.get("properties", {}).items():
            found.append(f"{path}{name}")
            if depth < 4:
                walk(inner, f"{path}{name}.", depth + 1)
        for inner in part.get("anyOf", []):
            walk(inner, path, depth)

    walk(schema, "", 0)
    towers = [
        f"model.architecture.{tower}.{field}"
        for tower in ("vision_cfg", "text_cfg")
        for field in (
            "layers",
            "width",
            "heads",
            "patch_size",
            "image_size",
            "context_length",
            "vocab_size",
            "mlp_ratio",
        )
    ]
    return [*sorted(set(found) - {"run"}), *towers]


def _misspelt(draw: random.Random, key: str) -> str:
    place = draw.randrange(len(key))
    return key[:place] + draw.choice(["", "x", key[place] * 2, ".", "\\"]) + key[place + 1 :]
