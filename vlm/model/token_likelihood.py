"""The log-likelihood of tokens under a vocabulary's softmax, without the logits of all tokens at once."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_CHUNK_LOGITS = 2**23  # logits at a time: 32 MiB


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
        columns = weight.to(product)
        values = states.new_empty((len(states), 2), dtype=_precise(states.dtype))
        sums = values.new_empty(len(states))
        for rows in _chunks(len(states), weight.shape[1]):
            logits = (states[rows].to(product) @ columns).to(values.dtype)
            sums[rows] = logits.logsumexp(1)
            values[rows, 0] = logits.gather(1, targets[rows, None])[:, 0] - sums[rows]
            values[rows, 1] = logits.mean(1) - sums[rows]
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
        for rows in _chunks(len(states), vocabulary):
            part = states[rows].to(ctx.product)
            to_logits = (part @ columns).to(gradient.dtype).sub_(sums[rows, None]).exp_()
            to_logits.mul_(-gradient[rows].sum(1, keepdim=True)).add_(gradient[rows, 1:] / vocabulary)
            to_logits.scatter_add_(1, targets[rows, None], gradient[rows, :1])
            to_logits = to_logits.to(ctx.product)
            if to_states is not None:
                to_states[rows] = (to_logits @ columns.T).to(states.dtype)
            if to_weight is not None:
                _add_product(to_weight, part, to_logits)
        return to_states, None if to_weight is None else to_weight.to(weight.dtype), None


def _add_product(total: Tensor, part: Tensor, to_logits: Tensor) -> None:
    if total.dtype == part.dtype:
        total.addmm_(part.T, to_logits)
    else:
        total.add_(part.T @ to_logits)


def _chunks(num_tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK_LOGITS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _product_type(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
