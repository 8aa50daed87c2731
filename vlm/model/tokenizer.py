"""Captions to token ids, as long as the longest of them where the text tower allows it."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from torch import Tensor

from vlm.errors import UserError, reason
from vlm.model.byte_pairs import BytePairs
from vlm.model.byte_pairs import clip_token_counts as clip_token_counts
from vlm.model.foreign import TOKENIZER_CONFIG, TOKENIZER_JSON, ForeignFiles, folder_of
from vlm.model.marked_texts import marked_texts

# Whatever the library raises about files that make no tokenizer (those in Rust raise Exception itself).
_LOAD_ERRORS = (Exception,)


class TokenBatch(NamedTuple):
    """Token ids of several texts: row i is text i, filled up with the padding id behind `lengths[i]` tokens."""

    tokens: Int64[Tensor, "batch length"]
    lengths: Int64[Tensor, " batch"]


@runtime_checkable
class FullTokenizer(Protocol):
    """open_clip's tokenizers: texts to ids of the full context length."""

    context_length: int

    def __call__(self, texts: list[str]) -> Tensor:
        """The ids `[texts, context_length]` of `texts`."""


class Tokenizer:
    """open_clip's token ids without the padding that the text tower can do without.

    A text's length counts its tokens up to and including the end token. With `shorten` a batch is as long as the
    longest of its texts, else as the context length. `marked` sets the marks of captions where the tokenizer has not.
    Objects of this class travel into data workers (pickled).
    """

    def __init__(
        self, full: FullTokenizer, *, shorten: bool, vocabulary: int | None = None, marked: bool = False
    ) -> None:
        self._full = full
        self._vocabulary = vocabulary  # of the text tower
        self._unknown = UnknownTokens(_unknown_id(full))
        self.context_length = full.context_length
        self.shorten = shorten
        self.pad_id = _pad_id(full)
        plain = isinstance(full, SimpleTokenizer) and full.reduction_fn is None
        self._byte_pairs = BytePairs(full) if plain else None
        self._marked = marked_texts(full) if marked else None

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        """The ids and lengths of `texts`; more than the context length is cut as open_clip cuts it."""
        if self._byte_pairs is not None:
            return self.padded(self._byte_pairs(texts))
        if self._marked is not None:
            made = self.padded(self._marked(texts))
            self._require_known(*made)
            return made
        ids = self._full(list(texts)).long()
        lengths = self._lengths(ids)
        self._require_known(ids, lengths)
        if self.shorten and len(ids):
            ids = ids[:, : int(lengths.max())].clone()
        return TokenBatch(ids, lengths)

    def inner(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text without the marks at its ends; at most a context of them, marks included."""
        if self._byte_pairs is not None:
            return [row[1:-1] for row in self._byte_pairs(texts)]
        ids, lengths = self(texts)
        return [row[1 : length - 1] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]

    @property
    def marks(self) -> tuple[int, int]:
        """The ids of the marks at the ends of a text, of a tokenizer that has such."""
        ids, lengths = self(["a"])
        return int(ids[0, 0]), int(ids[0, lengths[0] - 1])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without the marks at its ends and without double spaces."""
        library = getattr(self._full, "tokenizer", None)
        text = self._full.decode(tokens) if library is None else library.decode(tokens, skip_special_tokens=True)  # type: ignore[attr-defined]
        return " ".join(text.split())

    def padded(self, rows: Sequence[Sequence[int]]) -> TokenBatch:
        """A batch of rows that each end in the end token, which stays where one is cut."""
        context = self.context_length
        shortened = [row if len(row) <= context else [*row[: context - 1], row[-1]] for row in rows]
        lengths = np.fromiter(map(len, shortened), np.int64, len(shortened))
        width = int(lengths.max()) if self.shorten and shortened else context
        ids = np.full((len(shortened), width), self.pad_id, np.int64)
        ids[np.arange(width) < lengths[:, None]] = np.fromiter(chain.from_iterable(shortened), np.int64, lengths.sum())
        return TokenBatch(torch.from_numpy(ids), torch.from_numpy(lengths))

    def _require_known(self, ids: Int64[Tensor, "batch context"], lengths: Int64[Tensor, " batch"]) -> None:
        if self._vocabulary is not None and len(ids) and int(ids.max()) >= self._vocabulary:
            raise UserError(
                f"the tokenizer made token {int(ids.max())} of a text, but the text tower knows only {self._vocabulary}"
            )
        self._unknown.count(ids, lengths)

    def _lengths(self, ids: Int64[Tensor, "batch context"]) -> Int64[Tensor, " batch"]:
        positions = torch.arange(1, ids.shape[1] + 1)
        lengths = (positions * (ids != self.pad_id)).amax(1)
        if self.pad_id == getattr(getattr(self._full, "tokenizer", None), "eos_token_id", None):
            lengths += 1  # the first padding token is the end token
        return lengths.clamp(1, ids.shape[1])


class UnknownTokens:
    """Raises UserError when nearly all tokens of the first texts are unknown to a tokenizer: it is not theirs."""

    _TEXTS, _LARGEST_FRACTION = 64, 0.9

    def __init__(self, unknown_id: int | None) -> None:
        self._id = unknown_id
        self._texts = self._tokens = self._unknown = 0

    def count(self, ids: Int64[Tensor, "batch context"], lengths: Int64[Tensor, " batch"]) -> None:
        """Count the tokens of some texts, until enough were seen; each has two tokens that mark its ends."""
        if self._id is None or self._texts >= self._TEXTS:
            return
        self._texts += len(ids)
        self._tokens += int((lengths - 2).clamp(min=0).sum())
        self._unknown += int((ids == self._id).sum())
        if self._texts >= self._TEXTS and self._unknown > self._LARGEST_FRACTION * self._tokens:
            raise UserError(
                f"{self._unknown} of the first {self._tokens} tokens are unknown to the tokenizer: it is not made for "
                "these captions, or not the text model's own (towers.text.tokenizer)"
            )


def full_tokenizer(
    text_cfg: Mapping[str, Any], files: ForeignFiles | None = None, *, marked: bool = False
) -> FullTokenizer:
    """The tokenizer that open_clip pairs with a text tower of this `text_cfg`.

    `hf_tokenizer_name` may also be a local folder. Texts that are `marked` may be padded by their end, where there is
    no other padding. Raises UserError when a Hugging Face tokenizer cannot be loaded.
    """
    context_length = text_cfg.get("context_length") or DEFAULT_CONTEXT_LENGTH
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        try:
            return cast(FullTokenizer, SimpleTokenizer(context_length=context_length, **options))
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"tokenizer_kwargs: {options!r:.200} makes no tokenizer: {reason(error)}") from error
    try:
        stored = (files or ForeignFiles()).tokenizer(name)
    except UserError as error:
        raise _cannot_be_loaded(name, error) from error
    if _is_siglip(stored):
        # The library's own needs sentencepiece; it is the stored tokenizer after lower case, without punctuation.
        stored = {TOKENIZER_JSON: stored[TOKENIZER_JSON], TOKENIZER_CONFIG: _plain_class(stored)}
        options = {"clean": "canonicalize", **options}
    try:
        with folder_of(stored) as folder:
            loaded = HFTokenizer(
                str(folder),
                context_length=context_length,
                tokenizer_mode=text_cfg.get("tokenizer_mode"),
                **options,
                trust_remote_code=False,
            )
    except _LOAD_ERRORS as error:
        raise _cannot_be_loaded(name, error) from error
    loaded.tokenizer.name_or_path = name
    if marked and loaded.tokenizer.pad_token_id is None:
        loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    if loaded.tokenizer.pad_token_id is None:
        raise UserError(f"hf_tokenizer_name {name}: the tokenizer has no padding token, which batches of texts need")
    return cast(FullTokenizer, loaded)


def _cannot_be_loaded(name: str, error: Exception) -> UserError:
    words = reason(error).removeprefix(f"{name}: ")
    return UserError(f"hf_tokenizer_name {name}: the tokenizer cannot be loaded: {words}")


def _is_siglip(files: Mapping[str, bytes]) -> bool:
    settings = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    return TOKENIZER_JSON in files and str(settings.get("tokenizer_class")).startswith("SiglipTokenizer")


def _plain_class(files: Mapping[str, bytes]) -> bytes:
    settings = json.loads(files[TOKENIZER_CONFIG])
    return json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}).encode()


def _unknown_id(full: FullTokenizer) -> int | None:
    """The id of what a tokenizer does not know, where it stands for nothing else."""
    tokenizer = getattr(full, "tokenizer", None)
    unknown, *others = (getattr(tokenizer, f"{name}_token_id", None) for name in ("unk", "pad", "bos", "eos", "sep"))
    return None if unknown is None or unknown in others else int(unknown)


def _pad_id(full: FullTokenizer) -> int:
    pad = getattr(getattr(full, "tokenizer", None), "pad_token_id", None)
    return 0 if pad is None else int(pad)
