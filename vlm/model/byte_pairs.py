"""CLIP's byte pairs, several times faster than open_clip computes them and with the same ids."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer, canonicalize_text, get_clean_fn, whitespace_clean
from tokenizers import models

_MOST_WORDS = 1 << 16
_LONGEST_WORD = 32


def _lower(text: str) -> str:
    return str(whitespace_clean(text).lower())


# What remains of open_clip's cleaning functions when the repair of the text has nothing to do.
_WITHOUT_REPAIR = {
    get_clean_fn("lower"): _lower,
    get_clean_fn("whitespace"): whitespace_clean,
    get_clean_fn("canonicalize"): canonicalize_text,
}


class BytePairs:
    """The ids that open_clip's `SimpleTokenizer.encode` gives, for whole batches.

    open_clip's own pattern splits a text into words, so that scripts, case and special tokens cannot be taken
    differently; `tokenizers` merges the pairs of a word, which is then kept for its next visit. On captions this is
    twice as fast as leaving the splitting to `tokenizers` too. No threads are started, so a process may fork at any
    time, and the words kept are bounded.
    """

    def __init__(self, full: SimpleTokenizer) -> None:
        self._full = full
        self._clean_plain = _WITHOUT_REPAIR.get(full.clean_fn, full.clean_fn)
        self._special = {full.decoder[number]: number for number in full.all_special_ids}
        self._model: models.BPE | None = None
        self._words: dict[str, tuple[int, ...]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what each process builds for itself."""
        return {**self.__dict__, "_model": None, "_words": {}}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text from the start token to the end token, however many."""
        words, find = self._words, self._full.pat.findall
        rows = []
        for text in texts:
            row = [self._full.sot_token_id]
            for word in find(self._clean(text)):
                row += words.get(word) or self._merge(word)
            row.append(self._full.eot_token_id)
            rows.append(row)
        return rows

    def _clean(self, text: str) -> str:
        # ftfy and html.unescape leave printable ASCII as it is when it has no entity: the other checks that they make
        # are for bytes above 127, control characters and line ends. They are most of open_clip's time.
        if text.isascii() and text.isprintable() and "&" not in text:
            return str(self._clean_plain(text))
        return str(self._full.clean_fn(text))

    def _merge(self, word: str) -> tuple[int, ...]:
        if self._model is None:
            self._model = _byte_pair_model(self._full)
        symbols = "".join(map(self._full.byte_encoder.__getitem__, word.encode()))
        special = self._special.get(symbols)
        ids = tuple(token.id for token in self._model.tokenize(symbols)) if special is None else (special,)
        if len(word) <= _LONGEST_WORD:
            if len(self._words) >= _MOST_WORDS:
                self._words.clear()
            self._words[word] = ids
        return ids


def clip_token_counts(texts: Sequence[str]) -> NDArray[np.int64]:
    """How many tokens each text has in CLIP's byte pairs, with the start and the end token and before any cut."""
    return np.fromiter(map(len, _clip_byte_pairs()(texts)), np.int64, len(texts))


@cache
def _clip_byte_pairs() -> BytePairs:
    return BytePairs(SimpleTokenizer())


def _byte_pair_model(full: SimpleTokenizer) -> models.BPE:
    merges = [pair for pair in full.bpe_ranks if len(pair) == 2]  # the last line of a file is often empty
    # Words are kept above it, so its own cache would only double them.
    return models.BPE(vocab=full.encoder, merges=merges, cache_capacity=0, end_of_word_suffix="</w>")
