"""Step 1: the one number that a sample's captions name."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from data.counterfactuals.numbers import number_words


class Outcome(StrEnum):
    """What becomes of a sample: why it is left out, in the order applied, or that it is kept."""

    UNUSABLE = "unusable"
    NO_NUMBER = "no number"
    SEVERAL_NUMBERS = "several numbers"
    CAPTIONS_DISAGREE = "captions disagree"
    NO_DETECTIONS = "no detections"
    COUNT_DIFFERS = "count differs"
    CLASS_DIFFERS = "most frequent class differs"
    SHARED_KEY = "detections of several samples"
    BALANCE = "balance"
    KEPT = "kept"


@dataclass(frozen=True)
class NamedNumber:
    """A number from two to ten, and the places, among a sample's captions, of those that name it and no other."""

    value: int
    places: tuple[int, ...]


def named_number(captions: Sequence[str]) -> NamedNumber | Outcome:
    """The number that captions with exactly one spelled number name, or why there is none.

    Captions without a number, or with several, say nothing; two that name different numbers cannot both be believed.
    """
    words = [number_words(caption) for caption in captions]
    single = {place: found[0].value for place, found in enumerate(words) if len(found) == 1}
    values = set(single.values())
    if not values:
        return Outcome.SEVERAL_NUMBERS if any(words) else Outcome.NO_NUMBER
    if len(values) > 1:
        return Outcome.CAPTIONS_DISAGREE
    return NamedNumber(values.pop(), tuple(single))
