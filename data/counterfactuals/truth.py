"""Whether an edited caption is true after all, by what is known of its sample: its captions, and its objects."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from data.counterfactuals.editor import CaptionInSample
from data.counterfactuals.lexicon import singular
from data.counterfactuals.numbers import NUMBERS

_WORDS: Final = re.compile(r"\w+")
_REACH: Final = 3  # words between a number and what it counts: "three small bright red stars"


def is_true(edited: str, caption: CaptionInSample) -> bool:
    """Whether an edit says what is known to be so: a caption of the sample, or something of it that was not named.

    Objects are those of the json fields `counts` ({name: number}) and `objects` ([name, ...]): an edit may name none of
    them anew, neither without a number nor with its right one.
    """
    said = _words(edited)
    if any(said == _words(other) for other in (caption.text, *caption.captions)):
        return True
    objects = _objects(caption.fields)
    if not objects:
        return False
    new = _named(edited, objects) - _named(caption.text, objects)
    return any(number is None or objects[name] == number for name, number in new)


def _objects(fields: Mapping[str, Any]) -> dict[str, int | None]:
    """The objects that a sample has, and how many of each where that is known."""
    objects: dict[str, int | None] = {}
    listed, counts = fields.get("objects"), fields.get("counts")
    if isinstance(listed, list):
        objects |= {name: None for name in listed if isinstance(name, str)}
    if isinstance(counts, dict):
        objects |= {
            name: number
            for name, number in counts.items()
            if isinstance(number, int) and not isinstance(number, bool) and number > 0
        }
    return {" ".join(_singulars(name)): number for name, number in objects.items() if name}


def _named(text: str, objects: Mapping[str, int | None]) -> set[tuple[str, int | None]]:
    """The objects that a text names, with the number before each: None where none stands there."""
    words = _singulars(text)
    found = set()
    for name in objects:
        for start in _places(words, name.split()):
            numbers = [NUMBERS[word] for word in words[max(0, start - _REACH) : start] if word in NUMBERS]
            found.add((name, numbers[-1] if numbers else None))
    return found


def _places(words: list[str], name: list[str]) -> Iterator[int]:
    for start in range(len(words) - len(name) + 1):
        if words[start : start + len(name)] == name:
            yield start


def _singulars(text: str) -> list[str]:
    return [singular(word) for word in _words(text)]


def _words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return _WORDS.findall(text.casefold())
