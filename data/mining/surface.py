"""Likeness of two texts by their letters and words alone, from 0 to 1."""

import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Final, Literal

SurfaceName = Literal["ngrams", "edit", "none"]
_N = 3


def plain(text: str) -> str:
    """The text without case, doubled spaces and marks at its ends: texts that differ in this alone are one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .!?,;:'\"")


def ngram_overlap(one: str, other: str) -> float:
    """Dice's coefficient of the two texts' three-letter grams, with a space before and behind each text."""
    grams = [Counter(text[i : i + _N] for i in range(len(text) - _N + 1)) for text in (f" {one} ", f" {other} ")]
    total = grams[0].total() + grams[1].total()
    return 2 * (grams[0] & grams[1]).total() / total if total else float(one == other)


def word_edit_likeness(one: str, other: str) -> float:
    """One minus the least number of words put in, left out or replaced, over the longer text's (Levenshtein, 1966)."""
    words, others = one.split(), other.split()
    longest = max(len(words), len(others))
    if not longest:
        return 1.0
    before = list(range(len(others) + 1))
    for number, word in enumerate(words, start=1):
        now = [number]
        for place, another in enumerate(others, start=1):
            now.append(min(before[place] + 1, now[-1] + 1, before[place - 1] + (word != another)))
        before = now
    return 1 - before[-1] / longest


def no_surface(_one: str, _other: str) -> float:
    """The same for any two texts: what is left then is the embedding."""
    return 1.0


SURFACES: Final[dict[SurfaceName, Callable[[str, str], float]]] = {
    "ngrams": ngram_overlap,
    "edit": word_edit_likeness,
    "none": no_surface,
}
