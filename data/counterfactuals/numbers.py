"""Spelled numbers from two to ten in captions: where they stand, and captions with another in their place."""

import re
from typing import Final, NamedTuple

NUMBERS: Final[dict[str, int]] = {
    word: value
    for value, word in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 2)
}
WORDS: Final[dict[int, str]] = {value: word for word, value in NUMBERS.items()}
_ANY: Final = "|".join(NUMBERS)
# No part of a longer word or number (twenty-two, two-time, two hundred), and no name (number five).
_COUNT: Final = re.compile(
    rf"(?<![\w-])(?<!\bnumber )(?<!\bno\. )({_ANY})(?![\w-]|['\u2019]\w| (?:hundred|thousand|million|billion|dozen)\b)",
    re.IGNORECASE,
)


class NumberWord(NamedTuple):
    """A spelled number in a caption, and the characters where it stands."""

    value: int
    start: int
    stop: int


def number_words(caption: str) -> tuple[NumberWord, ...]:
    """The spelled numbers from two to ten that count something, in order.

    "one", digits, parts of other words ("network", "twenty-two", "two hundred") and names ("number five") are none.
    """
    return tuple(NumberWord(NUMBERS[one[1].lower()], one.start(), one.end()) for one in _COUNT.finditer(caption))


def only_number(caption: str) -> NumberWord | None:
    """The spelled number of a caption with exactly one; else None."""
    found = number_words(caption)
    return found[0] if len(found) == 1 else None


def with_number(caption: str, word: NumberWord, value: int) -> str:
    """The caption with the number of another `value` in the place of `word`, in the same case."""
    return caption[: word.start] + in_case_of(caption[word.start : word.stop], WORDS[value]) + caption[word.stop :]


def with_every(caption: str, value: int, other: int) -> str:
    """The caption with every occurrence of one number's word replaced by another's (CountBench's protocol).

    Whole words in whatever case, in their case; other numbers are left alone. A caption without the word is unchanged.
    """
    pattern = re.compile(rf"\b{WORDS[value]}\b", re.IGNORECASE)
    return pattern.sub(lambda found: in_case_of(found[0], WORDS[other]), caption)


def in_case_of(original: str, word: str) -> str:
    """A word in lower case, written as the original is: THREE, Three, or three."""
    if len(original) > 1 and original.isupper():
        return word.upper()
    return word.capitalize() if original[:1].isupper() else word
