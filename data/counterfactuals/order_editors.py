"""Editors of whole captions: their words in another order, and what they say denied."""

import re
from typing import Annotated, Final, Literal, TypeVar

from pydantic import Field

from data.counterfactuals.editor import EDITORS, CaptionInSample, Editor
from data.counterfactuals.numbers import in_case_of
from data.randomness import Draws

Item = TypeVar("Item")

_LEAST_WORDS: Final = 4
_NO_VERBS: Final = (
    "building|ceiling|clothing|evening|morning|railing|painting|wedding|pudding|string|spring|thing|nothing|something|"
    "everything|anything|ring|king|wing|swing|sibling|duckling|earring|during|being|living|dining|parking|swimming pool"
)
# What is denied, and by what; with a group, what stands in its place in the same case.
_DENIALS: Final = (
    (re.compile(r"\b(?:is|are|was|were)\b(?! not\b|n't)", re.IGNORECASE), r"\g<0> not"),
    (re.compile(r"\b(is|are|was|were) not\b", re.IGNORECASE), r"\1"),
    (re.compile(r"\bwithout\b", re.IGNORECASE), "with"),
    (re.compile(r"\bwith\b(?! no\b)", re.IGNORECASE), "without"),
    (re.compile(r"\band (?:an?|the|some)\b", re.IGNORECASE), "but no"),
    (
        re.compile(rf"(?<!\bis )(?<!\bare )(?<!\bnot )\b(?!(?:{_NO_VERBS})\b)[a-z]{{2,}}ing\b", re.IGNORECASE),
        r"not \g<0>",
    ),
)


@EDITORS.register("word_order")
class WordOrderEditor(Editor):
    """The words of a caption in another order, as in the order tests of ARO (Yuksekgonul et al., 2023)."""

    unit: Annotated[
        Literal["words", "trigrams", "within_trigrams"],
        Field(description="What is shuffled: all words, groups of three words, or the words within each group."),
    ] = "words"

    def applies(self, caption: CaptionInSample) -> bool:  # noqa: D102
        words = caption.text.split()
        return len(words) >= _LEAST_WORDS and len({word.lower() for word in words}) > 1

    def edit(self, caption: CaptionInSample, draws: Draws) -> str:  # noqa: D102
        words = caption.text.split()
        if self.unit == "words":
            return " ".join(_shuffled(words, draws))
        groups = [words[place : place + 3] for place in range(0, len(words), 3)]
        groups = _shuffled(groups, draws) if self.unit == "trigrams" else [_shuffled(group, draws) for group in groups]
        return " ".join(word for group in groups for word in group)


@EDITORS.register("negation")
class NegationEditor(Editor):
    """A caption that denies what it said: `is not`, `without` for `with`, `but no` for `and a`, `not` before a verb."""

    def applies(self, caption: CaptionInSample) -> bool:  # noqa: D102
        return any(pattern.search(caption.text) for pattern, _ in _DENIALS)

    def edit(self, caption: CaptionInSample, draws: Draws) -> str:  # noqa: D102
        places = [(match, denial) for pattern, denial in _DENIALS for match in pattern.finditer(caption.text)]
        match, denial = places[draws.integer(len(places))]
        words = match.expand(denial)
        return caption.text[: match.start()] + in_case_of(match[0], words) + caption.text[match.end() :]


def _shuffled(items: list[Item], draws: Draws) -> list[Item]:
    """The items in a drawn order (Fisher and Yates)."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = draws.integer(last + 1)
        items[last], items[other] = items[other], items[last]
    return items
