"""Captions to token ids, as long as the longest of them where the text tower allows it."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from torch import Tensor

from vlm.errors import UserError, reason
from vlm.model.byte_pairs import BytePairs
from vlm.model.byte_pairs import clip_token_counts as clip_token_counts


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
    longest of its texts, else as the context length. Objects of this class travel into data workers (pickled).
    """

    def __init__(self, full: FullTokenizer, *, shorten: bool) -> None:
        self._full = full
        self.context_length = full.context_length
        self.shorten = shorten
        self.pad_id = _pad_id(full)
        plain = isinstance(full, SimpleTokenizer) and full.reduction_fn is None
        self._byte_pairs = BytePairs(full) if plain else None

    def __call__(self, texts: Sequence[str]) -> TokenBatch:
        """The ids and lengths of `texts`; more than the context length is cut as open_clip cuts it."""
        if self._byte_pairs is not None:
            return self._filled(self._byte_pairs(texts))
        ids = self._full(list(texts)).long()
        lengths = self._lengths(ids)
        if self.shorten and len(ids):
            ids = ids[:, : int(lengths.max())].clone()
        return TokenBatch(ids, lengths)

    def save_pretrained(self, directory: Path) -> None:
        """Write the files of a Hugging Face tokenizer to `directory`; CLIP's own byte pairs need none."""
        if isinstance(self._full, HFTokenizer):
            self._full.save_pretrained(str(directory))

    def _filled(self, rows: list[list[int]]) -> TokenBatch:
        """A batch of rows that each end in the end token."""
        context = self.context_length
        kept = [row if len(row) <= context else [*row[: context - 1], row[-1]] for row in rows]
        lengths = np.fromiter(map(len, kept), np.int64, len(kept))
        width = int(lengths.max()) if self.shorten and kept else context
        ids = np.full((len(kept), width), self.pad_id, np.int64)
        ids[np.arange(width) < lengths[:, None]] = np.fromiter(chain.from_iterable(kept), np.int64, lengths.sum())
        return TokenBatch(torch.from_numpy(ids), torch.from_numpy(lengths))

    def _lengths(self, ids: Int64[Tensor, "batch context"]) -> Int64[Tensor, " batch"]:
        positions = torch.arange(1, ids.shape[1] + 1)
        lengths = (positions * (ids != self.pad_id)).amax(1)
        if self.pad_id == getattr(getattr(self._full, "tokenizer", None), "eos_token_id", None):
            lengths += 1  # the first padding token is the end token
        return lengths.clamp(1, ids.shape[1])


def full_tokenizer(text_cfg: Mapping[str, Any]) -> FullTokenizer:
    """The tokenizer that open_clip pairs with a text tower of this `text_cfg`.

    `hf_tokenizer_name` may also be a local folder. Raises UserError when a Hugging Face tokenizer cannot be loaded.
    """
    context_length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return cast(FullTokenizer, SimpleTokenizer(context_length=context_length, **options))
    try:
        loaded = HFTokenizer(
            name, context_length=context_length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **options
        )
    except (OSError, ValueError) as error:
        raise UserError(f"hf_tokenizer_name {name}: the tokenizer cannot be loaded: {reason(error)}") from error
    if loaded.tokenizer.pad_token_id is None:
        raise UserError(f"hf_tokenizer_name {name}: the tokenizer has no padding token, which batches of texts need")
    return cast(FullTokenizer, loaded)


def _pad_id(full: FullTokenizer) -> int:
    pad = getattr(getattr(full, "tokenizer", None), "pad_token_id", None)
    return 0 if pad is None else int(pad)
