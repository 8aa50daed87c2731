"""InfoNCE between any two kinds of rows, however many a sample has of each."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.rows import Rows
from vlm.similarity.entry_weights import EntryWeights, EqualKeys
from vlm.similarity.log_sum_exp import log_sum_exp


def contrast(x: Rows, y: Rows, scale: Float[Tensor, "1"]) -> Float[Tensor, ""]:
    """This rank's part of the symmetric InfoNCE loss between two kinds of rows: images and captions, audio, regions.

    value = ( mean over x of -log( sum_{j in P(i)} exp(a s_ij) / sum_j exp(a s_ij) ) + the same over y ) / 2

    with P(i) the rows of the same sample, s = <x_i, y_j> and a the scale. A row whose sample has none of the other kind
    has no loss, and counts in the mean. With one row of each a sample this is `clip`.
    """
    all_ids = y.samples.all_ids
    positives = _log_sum_exps(x, y, scale, (EqualKeys(x.samples.ids, all_ids, keep=True),))
    negatives = _log_sum_exps(x, y, scale, (EqualKeys(x.samples.ids, all_ids),))
    x_losses, y_losses = (
        torch.where(positive.isneginf(), 0.0, -logsigmoid(positive - negative))
        for positive, negative in zip(positives, negatives, strict=True)
    )
    return (x.samples.mean(x_losses) + y.samples.mean(y_losses)) / 2


def _log_sum_exps(x: Rows, y: Rows, scale: Tensor, weights: tuple[EntryWeights, ...]) -> tuple[Tensor, Tensor]:
    """Over all y of each own x, and over all x of each own y."""
    x_lse, column_lse = log_sum_exp(x.values, y.columns, scale, weights, matmul_dtype=x.samples.exchange.matmul_dtype)
    return x_lse, y.samples.ranks.merge_log_sum_exp(column_lse)
