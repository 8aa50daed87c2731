"""Log-sum-exp with weights of entries that a small network learns."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from vlm.similarity.entry_weights import EntryWeights
from vlm.similarity.tiles import slices

_BLOCK_ACTIVATIONS = 2**22  # rows x columns x hidden units at a time


class PairNetwork(NamedTuple):
    """g_ij = sigmoid(v tanh(W (x_i + y_j) + b) + c), between 0 and 1."""

    hidden: Float[Tensor, "hidden dim"]
    hidden_bias: Float[Tensor, " hidden"]
    output: Float[Tensor, " hidden"]
    output_bias: Float[Tensor, "1"]


def learned_log_sum_exp(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    scale: Float[Tensor, "1"],
    network: PairNetwork,
    excluded: tuple[EntryWeights, ...],
) -> Float[Tensor, " rows"]:
    """log( sum_j w_ij exp(a <x_i, y_j>) ) over the M_i entries of a row that are not excluded; -inf without any.

    w_ij = M_i g_ij / sum_k g_ik: weights have a mean of 1. Differentiable in rows, columns, scale and the network.
    Operations are O(rows columns (dim + hidden)); memory that of a block of rows, computed again in the backward.
    """
    block_rows = max(1, _BLOCK_ACTIVATIONS // max(1, len(columns) * len(network.hidden)))
    column_features = columns @ network.hidden.T  # the first layer is linear: W (x + y) = W x + W y
    results = [
        checkpoint(
            _block,
            rows[block],
            (columns, column_features),
            scale,
            network,
            (excluded, block),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for block in slices(len(rows), block_rows)
    ]
    return torch.cat(results) if results else rows.sum(1)


def _block(
    rows: Tensor,
    columns: tuple[Tensor, Tensor],
    scale: Tensor,
    network: PairNetwork,
    entries: tuple[tuple[EntryWeights, ...], slice],
) -> Tensor:
    activations = torch.tanh((rows @ network.hidden.T + network.hidden_bias)[:, None] + columns[1])
    logs = logsigmoid(activations @ network.output + network.output_bias)
    mask, counts = _mask(logs, *entries)
    products = (scale * (rows @ columns[0].T) + logs + mask).logsumexp(1)
    log_sums = products - (logs + mask).logsumexp(1) + counts.clamp(min=1).log()
    return log_sums.masked_fill(counts == 0, float("-inf"))


def _mask(like: Tensor, excluded: tuple[EntryWeights, ...], block: slice) -> tuple[Tensor, Tensor]:
    """Numbers to add to a block of rows' logits, and each row's number of entries. Nothing where none is left."""
    mask = torch.zeros_like(like)
    for some in excluded:
        some.add_logs(mask, mask, block, slice(0, like.shape[1]))
    counts = mask.exp().sum(1)
    return mask.masked_fill(counts[:, None] == 0, 0.0), counts
