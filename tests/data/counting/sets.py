"""What is in a counting set, read by webdataset."""

import json
from pathlib import Path
from typing import Any

from tests.data.filter.by_webdataset import read_by_webdataset

WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def kept_in(out: Path) -> dict[str, dict[str, Any]]:
    """The json of every sample in the folder, by key."""
    samples = (one for shard in sorted(out.rglob("*.tar")) for one in read_by_webdataset(shard))
    return {str(one["__key__"]): json.loads(one["json"]) for one in samples}


def tars_of(out: Path) -> dict[str, bytes]:
    """The shards of the folder, by their path below it."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.tar"))}


def expected(captions: list[str], counts: dict[str, int] | None) -> tuple[int, list[str]] | None:
    """The number and the captions that a sample is kept with, by loops over plain words; None where it is left out."""
    named: dict[str, int] = {}
    for caption in captions:
        numbers = [
            WORDS.index(word) + 2
            for word in "".join(letter if letter.isalpha() else " " for letter in caption.lower()).split()
            if word in WORDS
        ]
        if len(numbers) == 1:
            named[caption] = numbers[0]
    if len(set(named.values())) != 1:
        return None
    (number,) = set(named.values())
    if counts is not None and (not counts or max(counts.values()) != number):
        return None
    return number, list(named)
