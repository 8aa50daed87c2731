"""AdamW with the decay where it belongs."""

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from pydantic import Field
from torch import nn

from vlm.config import Config
from vlm.errors import EveryRankError


class LrScale(Config):
    """Factors of the learning rate for the parameters of each tower; heads, scale, bias and terms have factor 1."""

    image: float = Field(default=1.0, gt=0, le=1000, description="of the image tower")
    text: float = Field(default=1.0, gt=0, le=1000, description="of the text tower")

    def of(self, name: str) -> float:
        """The factor of the parameter called `name` in the model."""
        return {"image": self.image, "text": self.text}.get(name.partition(".")[0], 1.0)


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter, 2019); the defaults are CLIP's for ViT-B/32 at batch 32,768, apart from the rate."""

    lr: float = Field(default=1e-3, gt=0, le=10, description="peak learning rate")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(default=1e-6, gt=0, le=1, description="added to the root of that mean")
    weight_decay: float = Field(
        default=0.2, ge=0, le=100, description="share of the rate by which weights shrink; not biases, norms or scales"
    )
    lr_scale: LrScale = Field(
        default=LrScale(), description="factors of the rate for each tower, at every step of the schedule"
    )


def build_optimizer(module: nn.Module, config: OptimizerConfig, undecayed: AbstractSet[str]) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters of `module`; those named in `undecayed` get no weight decay.

    Each group of parameters has its factor of the learning rate as `lr_scale`, which `set_lr` follows. Raises
    EveryRankError when nothing trains.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for decayed in (True, False):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and (name not in undecayed) is decayed:
                decay = config.weight_decay if decayed else 0.0
                groups.setdefault((config.lr_scale.of(name), decay), []).append(parameter)
    if not groups:
        raise EveryRankError("model.lock: nothing is left to train: neither a tower, nor a projection, nor the scale")
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay), parameters in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    set_lr(optimizer.param_groups, config.lr)
    return optimizer


def optimizer_maker(config: OptimizerConfig, undecayed: AbstractSet[str]) -> Callable[[nn.Module], torch.optim.AdamW]:
    """The function that builds a module's optimizer when an engine has sharded its parameters."""
    return lambda module: build_optimizer(module, config, undecayed)


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give each group of parameters its learning rate: `lr` times its factor."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
