"""A recipe and shards small enough to train in seconds."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.data.small_shards import picture, sample, with_json, write_shard, write_source

WORDS = ["red", "green", "blue", "small", "large", "round", "square", "bright", "dark", "striped"]


def write_data(folder: Path) -> None:
    """60 training pairs in two uneven shards, and 30 held-out ones with classes and several captions."""
    write_source(folder, [37, 23], "train")
    held_out = []
    for number in range(30):
        captions = [f"a {WORDS[number % 10]} thing {number}", f"number {number}, {WORDS[number % 7]}"]
        one = with_json(500 + number, captions=captions)
        held_out.append({**one, "cls": number % 6})
    write_shard(folder / "test-0.tar", held_out)
    (folder / "classes.json").write_text(json.dumps([f"{word} thing" for word in WORDS[:6]]))


def recipe_values(folder: Path, run: Path) -> dict[str, Any]:
    """A recipe over `write_data(folder)`, logged at every step."""
    return {
        "run": str(run),
        "model": {
            "architecture": {
                "embed_dim": 32,
                "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
                "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
            }
        },
        "data": {"root": str(folder), "sources": {"pairs": {"shards": "train-*.tar"}}, "workers": 0},
        "duration": "20 steps",
        "global_batch": 12,
        "optimizer": {"lr": 0.002},
        "schedule": {"warmup": "4 steps"},
        "log_every": "1 step",
        "checkpoint_every": "10 steps",
        "keep_checkpoints": None,
        "record_samples": True,
        "trackers": [],
        "evaluate": {
            "zeroshot": {"kind": "zeroshot", "shards": "test-*.tar", "classes": "classes.json", "every": "10 steps"},
            "retrieval": {"kind": "retrieval", "shards": "test-*.tar"},
        },
    }


def write_recipe(folder: Path, run: Path, **changes: Any) -> Path:
    """The small recipe as a file, top-level keys replaced by `changes`."""
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe_values(folder, run), **changes}))
    return path


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without the fields that tell time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait", "crc32")} for line in lines]


def losses_of(run: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in metrics_of(run) if "loss" in line]


def keys_of(run: Path) -> dict[int, list[str]]:
    """The sample keys of every step, over all ranks."""
    keys: dict[int, list[str]] = {}
    for path in sorted((run / "samples").glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            keys.setdefault(record["step"], []).extend(record["keys"])
    return keys


__all__ = ["keys_of", "losses_of", "metrics_of", "picture", "recipe_values", "sample", "write_data", "write_recipe"]
