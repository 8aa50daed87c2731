"""AdamW, in one kernel for all parameters."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from vlm.training.optimizers.base import OPTIMIZERS, OptimizerConfig


@OPTIMIZERS.register("adamw")
class AdamW(OptimizerConfig):
    """AdamW (Loshchilov & Hutter, 2019); the defaults are CLIP's for ViT-B/32 at batch 32,768, apart from the rate."""

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    kind: Literal["adamw"] = Field(default="adamw", description="Adam with the weight decay beside its step")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(default=1e-6, gt=0, le=1, description="added to the root of that mean")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)
