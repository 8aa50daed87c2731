"""The limit on the logit scale: in the forward, with a gradient that passes only when it lowers the value."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

MAX_LOGIT_SCALE = 100.0
INITIAL_LOGIT_SCALE = 1 / 0.07


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_scale: Tensor) -> Tensor:
        ctx.save_for_backward(log_scale)
        return log_scale.clamp(max=math.log(MAX_LOGIT_SCALE))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (log_scale,) = ctx.saved_tensors
        passes: Tensor = (log_scale <= math.log(MAX_LOGIT_SCALE)) | (gradient > 0)
        return gradient * passes


def limited_scale(log_scale: Float[Tensor, "1"]) -> Float[Tensor, "1"]:
    """The logit scale of CLIP from its learned logarithm, at most 100 (Radford et al., 2021, section 2.5).

    Above the limit the gradient passes only when a step against it would lower the parameter, which can so come
    back. That is a question to the gradient of the whole global batch: on several ranks, go backward from their mean.
    (An in-place clamp after the step would be undone by ZeRO's master copy of the weights.)
    """
    limited: Tensor = _Limit.apply(log_scale)
    return limited.exp()


def current_scale(log_scale: Tensor) -> float:
    """The logit scale that a model's parameter stands for. Collective where an engine keeps the parameter sharded."""
    log_scale = log_scale.detach()
    return limited_scale(log_scale.full_tensor() if isinstance(log_scale, DTensor) else log_scale).item()
