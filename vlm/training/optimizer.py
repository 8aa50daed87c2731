"""AdamW with the decay where it belongs."""

from collections.abc import Set as AbstractSet

import torch
from pydantic import Field
from torch import nn

from vlm.config import Config


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter, 2019); the defaults are CLIP's for ViT-B/32 at batch 32,768, apart from the rate."""

    lr: float = Field(default=1e-3, gt=0, le=10, description="peak learning rate")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(default=1e-6, gt=0, le=1, description="added to the root of that mean")
    weight_decay: float = Field(
        default=0.2, ge=0, le=100, description="share of the rate by which weights shrink; not biases, norms or scales"
    )


def build_optimizer(module: nn.Module, config: OptimizerConfig, undecayed: AbstractSet[str]) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters of `module`; those named in `undecayed` get no weight decay."""
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trainable.items() if name not in undecayed]
    plain = [p for name, p in trainable.items() if name in undecayed]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
