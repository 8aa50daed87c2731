"""Whether the txt members of a held-out set hold one caption each, or one a line as public retrieval sets do."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from data.samples.captions import TXT, CaptionsByField
from data.shards.store import is_remote

_TASK_FILE = "dataset_type.txt"


def detect_layout(shards: Iterable[str], captions: Sequence[CaptionsByField]) -> Literal["whole", "lines", "mixed"]:
    """The layout of a set with these shards, whose samples have these captions where each txt member is one.

    "lines" by a file `dataset_type.txt` near the shards that says retrieval, or by the texts: every sample has a txt
    member of several lines, and none has captions in its json. "mixed" where most have several lines, and others not.
    """
    if any(_is_public_retrieval(shard) for shard in shards):
        return "lines"
    captioned = [by_field for by_field in captions if by_field]
    several = sum("\n" in by_field.get(TXT, ("",))[0] for by_field in captioned)
    if captioned and several == len(captioned):
        return "lines"
    return "mixed" if several > len(captioned) / 2 else "whole"


def _is_public_retrieval(shard: str) -> bool:
    if is_remote(shard):
        return False
    for folder in list(Path(shard).absolute().parents)[:2]:
        try:
            if (folder / _TASK_FILE).read_text(encoding="utf-8-sig").strip().endswith("retrieval"):
                return True
        except (OSError, ValueError):
            continue
    return False
