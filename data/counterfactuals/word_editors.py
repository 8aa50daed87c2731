"""Editors of words: another colour, attribute or thing in a caption, or two of its words in each other's place."""

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator

from data.counterfactuals.editor import EDITORS, CaptionInSample, Editor
from data.counterfactuals.lexicon import ATTRIBUTE_WORDS, COLOUR_WORDS, NOUN_WORDS, Lexicon, Word
from data.counterfactuals.numbers import in_case_of
from data.randomness import Draws
from vlm.errors import nearest

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_ARTICLE = re.compile(r"\b(an?)( +)\Z", re.IGNORECASE)
_VOWELS = "aeiou"
# Between two words of a list, which may change places without a change of what is said: "a man and a woman".
_CONJUNCTIONS = ("and", "or", "with", "beside", "near", "by", "next", "to", "alongside")
_JOINING = frozenset((*_CONJUNCTIONS, "a", "an", "the", "his", "her", "its", "their", "some"))
# What stands before a noun that nothing describes.
_BARE = re.compile(r"(?:^|\b(?:an?|the|his|her|its|their|some|and|of)|[.,;])\W*\Z", re.IGNORECASE)


class FoundWord(NamedTuple):
    """A word of a lexicon in a caption: what it is, and the characters where it stands."""

    word: Word
    start: int
    stop: int


def words_in(text: str, lexicon: Lexicon, groups: tuple[str, ...] | None = None) -> Iterator[FoundWord]:
    """The words of a caption that a lexicon has, of some of its groups; one that is in several comes several times."""
    for match in _WORD.finditer(text):
        for word in lexicon.find(match[0]):
            if groups is None or word.group in groups:
                yield FoundWord(word, match.start(), match.end())


def with_word(text: str, place: FoundWord, other: str) -> str:
    """The caption with another word in a place, in the case of what stood there, behind a fitting `a` or `an`."""
    before, original = text[: place.start], text[place.start : place.stop]
    article = _ARTICLE.search(before)
    if article is not None:
        fitting = "an" if other[0].lower() in _VOWELS else "a"
        before = before[: article.start()] + in_case_of(article[1], fitting) + article[2]
    return before + in_case_of(original, other) + text[place.stop :]


class Replacement(Editor):
    """Another word of the same group in place of one of a caption's."""

    lexicon: ClassVar[Lexicon]
    groups: Annotated[
        tuple[str, ...] | None, Field(min_length=1, description="Groups of words that are replaced; null: all.")
    ] = None

    @field_validator("groups")
    @classmethod
    def _known(cls, groups: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for group in groups or ():
            if group not in cls.lexicon.things:
                raise ValueError(f"found {group!r}; {nearest(group, cls.lexicon.things)}")
        return groups

    def applies(self, caption: CaptionInSample) -> bool:  # noqa: D102
        return next(words_in(caption.text, self.lexicon, self.groups), None) is not None

    def edit(self, caption: CaptionInSample, draws: Draws) -> str:  # noqa: D102
        places = list(words_in(caption.text, self.lexicon, self.groups))
        place = places[draws.integer(len(places))]
        others = self.lexicon.others(place.word)
        return with_word(caption.text, place, others[draws.integer(len(others))])


@EDITORS.register("colour")
class ColourEditor(Replacement):
    """Another colour in place of one of a caption's."""

    lexicon: ClassVar[Lexicon] = COLOUR_WORDS


@EDITORS.register("attribute")
class AttributeEditor(Replacement):
    """Another attribute of the same group (size, age, material, weather, ...) in place of one of a caption's."""

    lexicon: ClassVar[Lexicon] = ATTRIBUTE_WORDS


@EDITORS.register("noun")
class NounEditor(Replacement):
    """Another thing of the same group (pets, vehicles, furniture, sports, ...) in place of one of a caption's."""

    lexicon: ClassVar[Lexicon] = NOUN_WORDS


@EDITORS.register("swap")
class SwapEditor(Editor):
    """Two nouns of a caption, or two of its colours or attributes, in each other's place.

    Not where that says the same again: "a man and a woman" has no swap, "a tall man and a woman" has one.
    """

    of: Annotated[
        Literal["nouns", "attributes"],
        Field(description="Things, or two colours or attributes of one group, by the lists of the other editors."),
    ] = "nouns"

    def applies(self, caption: CaptionInSample) -> bool:  # noqa: D102
        return bool(self._swaps(caption.text))

    def edit(self, caption: CaptionInSample, draws: Draws) -> str:  # noqa: D102
        swaps = self._swaps(caption.text)
        first, second = swaps[draws.integer(len(swaps))]
        words = [caption.text[place.start : place.stop].lower() for place in (first, second)]
        return with_word(with_word(caption.text, second, words[0]), first, words[1])

    @property
    def _lexicons(self) -> tuple[Lexicon, ...]:
        return (NOUN_WORDS,) if self.of == "nouns" else (COLOUR_WORDS, ATTRIBUTE_WORDS)

    def _swaps(self, text: str) -> list[tuple[FoundWord, FoundWord]]:
        places = [place for lexicon in self._lexicons for place in words_in(text, lexicon)]
        places = sorted({place.start: place for place in reversed(places)}.values(), key=lambda place: place.start)
        return [pair for pair in combinations(places, 2) if self._tells(text, *pair)]

    def _tells(self, text: str, first: FoundWord, second: FoundWord) -> bool:
        """Whether a swap changes what is said: different things in the same number, and not two of a list."""
        if first.word.is_plural != second.word.is_plural:
            return False
        if self.of == "attributes" and first.word.group != second.word.group:
            return False
        if (first.word.group, first.word.thing) == (second.word.group, second.word.thing):
            return False
        between = _WORD.findall(text[first.stop : second.start])
        is_listed = all(word.lower() in _JOINING or any(one.find(word) for one in self._lexicons) for word in between)
        return not is_listed or (self.of == "nouns" and _BARE.search(text[: first.start]) is None)
