"""The log-likelihood of tokens under a vocabulary's softmax, without the logits of all tokens at once."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK_LOGITS = 2**23
"""Logits that there are at a time: 32 MiB."""


def token_likelihood(
    states: Float[Tensor, "tokens width"], weight: Float[Tensor, "width vocabulary"], targets: Int64[Tensor, " tokens"]
) -> Float[Tensor, "tokens 2"]:
    """log p(target) of each token, and the mean of log p over the vocabulary, at least in fp32.

    p is the softmax of `states @ weight`. Memory is O(chunk vocabulary): logits are computed by chunks of tokens, and
    again in the backward. Under autocast the products are of its type.
    """
    values: Tensor = _TokenLikelihood.apply(states, weight, targets)
    return values


class _TokenLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """log p(target) = logit - lse, and mean(logits) - lse."""
        product = _product_type(states)
        columns, vocabulary = weight.to(product), weight.shape[1]
        values = states.new_empty((len(states), 2), dtype=_precise(states.dtype))
        sums = values.new_empty(len(states))
        chunks = _chunks(len(states), vocabulary)
        buffer = values.new_empty(_size(chunks), vocabulary)
        for rows in chunks:
            logits = _logits(states[rows].to(product), columns, buffer)
            largest = logits.amax(1)
            values[rows, 0] = logits.gather(1, targets[rows, None])[:, 0]
            values[rows, 1] = logits.mean(1)
            sums[rows] = logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
        values -= sums[:, None]
        ctx.save_for_backward(states, weight, targets, sums)
        ctx.product = product
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """d log p(t) / d logits = onehot - p, and d mean log p / d logits = 1 / V - p."""
        states, weight, targets, sums = ctx.saved_tensors
        (gradient,) = gradients
        columns, vocabulary = weight.to(ctx.product), weight.shape[1]
        wants_states, wants_weight, _ = ctx.needs_input_grad
        to_states = torch.empty_like(states) if wants_states else None
        to_weight = torch.zeros_like(weight, dtype=gradient.dtype) if wants_weight else None
        chunks = _chunks(len(states), vocabulary)
        buffer = gradient.new_empty(_size(chunks), vocabulary)
        for rows in chunks:
            part = states[rows].to(ctx.product)
            to_logits = _logits(part, columns, buffer).sub_(sums[rows, None]).exp_()
            to_logits.mul_(-gradient[rows].sum(1, keepdim=True)).add_(gradient[rows, 1:] / vocabulary)
            to_logits.scatter_add_(1, targets[rows, None], gradient[rows, :1])
            to_logits = to_logits.to(ctx.product)
            if to_states is not None:
                to_states[rows] = (to_logits @ columns.T).to(states.dtype)
            if to_weight is not None:
                _add_product(to_weight, part, to_logits)
        return to_states, None if to_weight is None else to_weight.to(weight.dtype), None


def _logits(states: Tensor, columns: Tensor, buffer: Tensor) -> Tensor:
    """The logits of some tokens, in a buffer that all chunks share: new memory for each would cost more than it."""
    logits = buffer[: len(states)]
    if logits.dtype == states.dtype:
        return torch.mm(states, columns, out=logits)
    return logits.copy_(states @ columns)


def _add_product(total: Tensor, part: Tensor, to_logits: Tensor) -> None:
    if total.dtype == part.dtype:
        total.addmm_(part.T, to_logits)
    else:
        total.add_(part.T @ to_logits)


def _chunks(num_tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _size(chunks: list[slice]) -> int:
    return max((rows.stop - rows.start for rows in chunks), default=0)


def _product_type(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
