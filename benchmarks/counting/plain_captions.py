"""Shards of scenes as the web would have them: captions that do not count, and captions whose numbers are wrong."""

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data.counterfactuals.numbers import only_number, with_number
from data.randomness import Draws

Change = Callable[[dict[str, Any], str], dict[str, Any]]
_COUNT = re.compile(r"\b(?:two|three|four|five|six|seven|eight|nine|ten|[2-9]|10)\b", re.IGNORECASE)


def without_numbers(fields: dict[str, Any], key: str) -> dict[str, Any]:  # noqa: ARG001 - a `Change`
    """All numbers from two on replaced by "some"."""
    return {**fields, "captions": [_COUNT.sub("some", caption) for caption in fields["captions"]]}


def with_wrong_numbers(fields: dict[str, Any], key: str) -> dict[str, Any]:
    """Captions with exactly one number, which in every other sample is a drawn one, as of what a picture does not show.

    A sample without such a caption keeps those that it has.
    """
    captions = [caption for caption in fields["captions"] if only_number(caption) is not None]
    draws = Draws("wrong number", key)
    if draws.integer(2):
        captions = [_changed(caption, 2 + draws.integer(9)) for caption in captions]
    return {**fields, "captions": captions or fields["captions"]}


def _changed(caption: str, value: int) -> str:
    word = only_number(caption)
    assert word is not None
    return with_number(caption, word, value)


def rewrite(shards: Iterable[Path], folder: Path, prefix: str, change: Change) -> str:
    """Copies of shards with changed json, whose captions alone are left; their pattern. Those that are there stay."""
    for shard in shards:
        copy = folder / shard.name.replace(shard.name.split("-")[0], prefix, 1)
        if copy.exists():
            continue
        aside = copy.with_suffix(".part")
        with tarfile.open(shard) as stored, tarfile.open(aside, "w") as made:
            for member in stored:
                content = stored.extractfile(member)
                assert content is not None
                raw = content.read()
                if member.name.endswith(".txt"):
                    continue
                if member.name.endswith(".json"):
                    raw = json.dumps(change(json.loads(raw), member.name)).encode()
                    member.size = len(raw)
                made.addfile(member, io.BytesIO(raw))
        aside.rename(copy)
    return str(folder / f"{prefix}-*.tar")
