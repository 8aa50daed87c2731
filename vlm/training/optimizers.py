"""Optimizers by name, with the weight decay and each tower's learning rate where they belong."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import nn

from vlm.config import Config
from vlm.errors import EveryRankError
from vlm.registered import OrOnesOwn, reader, union_of
from vlm.registry import Registry

_DEFAULT = "adamw"


class LrScale(Config):
    """Factors of the learning rate for the parameters of each tower; heads, scale, bias and terms have factor 1."""

    image: float = Field(default=1.0, gt=0, le=1000, description="of the image tower")
    text: float = Field(default=1.0, gt=0, le=1000, description="of the text tower")

    def of(self, name: str) -> float:
        """The factor of the parameter called `name` in the model."""
        return {"image": self.image, "text": self.text}.get(name.partition(".")[0], 1.0)


class OptimizerConfig(Config, ABC):
    """The optimizer of a run; each kind adds its numbers and says how it is built.

    Its state of a parameter may be `step`, its count of updates, and the tensors named in `moments`: one number for
    each of the parameter's. Engines may flatten parameters, and cut them into parts.
    """

    moments: ClassVar[tuple[str, ...]]

    kind: str = Field(description="The optimizer: a name, or your own as package.module:Class.")
    lr: float = Field(default=1e-3, gt=0, le=10, description="peak learning rate")
    weight_decay: float = Field(
        default=0.2, ge=0, le=100, description="share of the rate by which weights shrink; not biases, norms or scales"
    )
    lr_scale: LrScale = Field(
        default=LrScale(), description="factors of the rate for each tower, at every step of the schedule"
    )

    @model_validator(mode="after")
    def _says_what_it_keeps(self) -> "OptimizerConfig":
        if not isinstance(getattr(type(self), "moments", None), tuple):
            words = "has no `moments`: a tuple of the names of what it keeps of each parameter"
            raise ValueError(f"{type(self).__name__} {words}")  # noqa: TRY004 - pydantic wants this one
        return self

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of groups of parameters, each of which has its `weight_decay`."""


OPTIMIZERS: Registry[type[OptimizerConfig]] = Registry("optimizer", OptimizerConfig)


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


AnyOptimizer = Annotated[
    SerializeAsAny[OptimizerConfig],
    BeforeValidator(reader(OPTIMIZERS, _DEFAULT), json_schema_input_type=union_of(OPTIMIZERS)),
    OrOnesOwn(_DEFAULT),
]


@dataclass(frozen=True)
class OptimizerMaker:
    """The function that builds a module's optimizer; parameters in `undecayed`, by name, get no weight decay.

    Those names are taken before an engine shards the parameters: some depend on their shapes.
    """

    config: OptimizerConfig
    undecayed: AbstractSet[str]

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the tensors that the optimizer keeps of each parameter."""
        return self.config.moments

    def __call__(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a module's trainable parameters.

        Each group of parameters has its factor of the learning rate as `lr_scale`, which `set_lr` follows. Raises
        EveryRankError when nothing trains.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for decayed in (True, False):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and (name not in self.undecayed) is decayed:
                    decay = self.config.weight_decay if decayed else 0.0
                    groups.setdefault((self.config.lr_scale.of(name), decay), []).append(parameter)
        if not groups:
            raise EveryRankError(
                "model.lock: nothing is left to train: neither a tower, nor a projection, nor the scale"
            )
        optimizer = self.config.build(
            [
                {"params": parameters, "weight_decay": decay, "lr_scale": scale}
                for (scale, decay), parameters in groups.items()
            ]
        )
        set_lr(optimizer.param_groups, self.config.lr)
        self._check_after_first_step(optimizer)
        return optimizer

    def _check_after_first_step(self, optimizer: torch.optim.Optimizer) -> None:
        def check(stepped: torch.optim.Optimizer, *_: object) -> None:
            handle.remove()
            self._require_saved(stepped)

        handle = optimizer.register_step_post_hook(check)

    def _require_saved(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise EveryRankError for a state that no checkpoint would hold: a run could not go on exactly."""
        kept = {name for state in optimizer.state.values() for name, value in state.items() if value is not None}
        if lost := sorted(kept - {"step", *self.moments}):
            raise EveryRankError(
                f"optimizer.kind: {self.config.kind} keeps {lost[0]!r} of each parameter, which its `moments` do not "
                "name: checkpoints would lack it"
            )


def set_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Give each group of parameters its learning rate: `lr` times its factor."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def no_weight_decay_names(model: nn.Module) -> frozenset[str]:
    """The parameters to keep from weight decay: logit scale and bias, norms, biases, and all others of one dimension.

    Ask before an engine shards the parameters: they lose their shape then.
    """
    names = set()
    for prefix, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if is_norm or parameter.ndim < 2 or name.endswith("bias"):
                names.add(name)
    return frozenset(names)
