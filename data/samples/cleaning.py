"""Cleaning of captions: small steps that a recipe names, each of them a function of the text alone."""

import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

CleaningStep = Literal["whitespace", "html", "urls", "control", "unicode"]

_ENTITY_ROUNDS = 8
_TAG = re.compile(r"</?[a-zA-Z!][^>]*>")
_URL = re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE)
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]"
)


def cleaned(text: str, steps: Iterable[CleaningStep]) -> str:
    """`text` after `steps`, stripped."""
    for step in steps:
        text = _STEPS[step](text)
    return text.strip()


def _collapse_whitespace(text: str) -> str:
    """Single spaces for every run of white space, line ends among it."""
    return " ".join(text.split())


def _strip_html(text: str) -> str:
    """Entities resolved, also those written out several times over; a space for each tag and comment."""
    for _ in range(_ENTITY_ROUNDS):
        text, before = html.unescape(text), text
        if text == before:
            break
    # Behind the last ">" nothing can close a tag: looking there would take time quadratic in a hostile text's length.
    inside, closing, outside = text.rpartition(">")
    return _TAG.sub(" ", inside + closing) + outside


def _remove_urls(text: str) -> str:
    """A space for each http(s) address and each word that begins with `www.`."""
    return _URL.sub(" ", text)


def _remove_controls(text: str) -> str:
    """Without characters that show nothing: controls other than white space, zero-width spaces, marks of direction.

    Joiners stay, since Indic and Arabic scripts and emoji need them; half surrogate pairs go, since no UTF-8 has them.
    """
    return _CONTROL.sub("", text)


def _compose(text: str) -> str:
    """Unicode's composed form (NFC): a letter and its accent are one character."""
    return unicodedata.normalize("NFC", text)


_STEPS: Mapping[CleaningStep, Callable[[str], str]] = {
    "whitespace": _collapse_whitespace,
    "html": _strip_html,
    "urls": _remove_urls,
    "control": _remove_controls,
    "unicode": _compose,
}
