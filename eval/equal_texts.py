"""Texts that a model cannot tell apart: those whose tokens are equal, in case, spacing or beyond the context length."""

import torch
from jaxtyping import Int64
from torch import Tensor

from vlm.model.tokenizer import TokenBatch


def equal_tokens(texts: TokenBatch) -> Int64[Tensor, " texts"]:
    """For each text the position of the first text with the same tokens."""
    return equal_rows(token_rows(texts))


def token_rows(texts: TokenBatch) -> Int64[Tensor, "texts columns"]:
    """The length and the tokens of each text, side by side."""
    return torch.cat([texts.lengths[:, None], texts.tokens], dim=1)


def equal_rows(rows: Int64[Tensor, "rows columns"]) -> Int64[Tensor, " rows"]:
    """For each row the position of the first row that equals it."""
    _, numbers = torch.unique(rows, dim=0, return_inverse=True)
    firsts = torch.full((len(rows),), len(rows))
    firsts.scatter_reduce_(0, numbers, torch.arange(len(rows)), "amin")
    return firsts[numbers]
