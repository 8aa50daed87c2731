"""The parts of a file of detections: names, scores, and counts of classes, each checked."""

import math
from collections.abc import Iterable
from typing import Any, Final

from vlm.paths import shown

Counts = tuple[int, ...]
"""Detected objects of each class that has any, the most frequent class first; of no class where nothing was found."""

MOST_OBJECTS: Final = 10**9


class BadEntryError(Exception):
    """An entry of detections that says nothing; the text says why."""


def in_order(counts: Iterable[int]) -> Counts:
    """The counts of classes, given in any order."""
    return tuple(sorted((count for count in counts if count), reverse=True))


def counts_of_classes(stored: Any) -> Counts:
    """The counts of a json object of class names and numbers. Raises BadEntryError where it is none."""
    if not isinstance(stored, dict):
        raise BadEntryError(f"an object of classes and numbers is needed, found {shown(stored)}")
    for name, count in stored.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST_OBJECTS:
            raise BadEntryError(f"class {shown(name)}: a number of objects is needed, found {shown(count)}")
    return in_order(stored.values())


def name_of(value: Any) -> str | None:
    """What samples, and classes, are told apart by, as text: texts and whole numbers; None for anything else."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def is_sure(detection: dict[str, Any], min_score: float) -> bool:
    """Whether a detection counts: its score is not below the least one, or it has none. Raises BadEntryError."""
    score = detection.get("score")
    if score is None:
        return True
    if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
        raise BadEntryError(f"score: a number is needed, found {shown(score)}")
    return score >= min_score
