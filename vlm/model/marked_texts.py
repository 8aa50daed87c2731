"""Texts between marks, for captions out of tokenizers that set none of their own (GPT-2's, Llama's)."""

from collections.abc import Sequence
from typing import Any

from open_clip.tokenizer import HFTokenizer

_TEXTS = ("a dog", "two small cats on a table", "red")


class MarkedTexts:
    """The ids of texts between a tokenizer's own first and last token; marks that are written in them are left out."""

    def __init__(self, full: HFTokenizer, start: int, end: int) -> None:
        self._full = full
        self._start, self._end = start, end

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text from the start token to the end token, however many."""
        cleaned = [self._full.clean_fn(text) for text in texts]
        rows = self._full.tokenizer(cleaned, add_special_tokens=False).input_ids
        marks = (self._start, self._end)
        return [[self._start, *(token for token in row if token not in marks), self._end] for row in rows]


def marked_texts(full: Any) -> MarkedTexts | None:
    """How the texts of a Hugging Face tokenizer get marks; None where it sets both itself, or has none.

    One that knows no first token begins with its last, as GPT-2 was trained.
    """
    if not isinstance(full, HFTokenizer) or full.tokenizer_mode:
        return None
    library: Any = full.tokenizer
    rows = library(list(_TEXTS)).input_ids
    sets_both = len({row[0] for row in rows}) == len({row[-1] for row in rows}) == 1 and min(map(len, rows)) > 2
    end = library.eos_token_id
    if sets_both or end is None:
        return None
    start = end if library.bos_token_id is None else library.bos_token_id
    return MarkedTexts(full, int(start), int(end))
