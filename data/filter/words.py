"""Words as the filter counts them: unigrams, bigrams, and when two alt-texts are the same."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from data.check.samples import hash64

_EDGES = re.compile(r"^\W+|\W+$")


def normal_form(text: str) -> str:
    """The unigrams of a text, one blank between: case-folded, cut at white space, without punctuation at their ends.

    Two alt-texts are the same when their normal forms are. Languages written without blanks are one word to it.
    """
    plain = unicodedata.normalize("NFKC", text.encode("utf-8", "replace").decode("utf-8")).casefold()
    return " ".join(filter(None, (_EDGES.sub("", word) for word in plain.split())))


def grams(normal: str) -> list[str]:
    """The unigrams and the bigrams of a normal form."""
    words = normal.split()
    return [*words, *(f"{first} {second}" for first, second in pairwise(words))]


def gram_ids(gram_texts: Sequence[str]) -> list[int]:
    """The 64-bit names under which unigrams and bigrams are counted."""
    return [hash64(gram.encode("utf-8")) for gram in gram_texts]
