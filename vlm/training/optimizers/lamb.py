"""LAMB, whose step in each tensor is in proportion to the tensor's norm."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import timm.optim
import torch
from pydantic import Field

from vlm.training.engines.options import Layout
from vlm.training.optimizers.base import OPTIMIZERS, OptimizerConfig


@OPTIMIZERS.register("lamb")
class Lamb(OptimizerConfig):
    """LAMB (You et al., 2020) as timm has it, for very large batches.

    Norms of whole tensors scale its steps: engines that flatten them do not carry it. Without weight decay, and so for
    biases and norms, its step is Adam's unless `always_adapt`.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    layouts: ClassVar[frozenset[Layout]] = frozenset({"whole", "rows"})
    communicates: ClassVar[bool] = True

    kind: Literal["lamb"] = Field(description="Adam's step, scaled to the norm of each tensor")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(default=1e-6, gt=0, le=1, description="added to the root of that mean")
    trust_clip: bool = Field(default=False, description="never scale a step up (LAMBC: Fong et al., 2020)")
    always_adapt: bool = Field(default=False, description="scale the steps of parameters without weight decay too")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:  # noqa: D102
        return _CountedLamb(
            groups,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            max_grad_norm=None,  # engines clip
            trust_clip=self.trust_clip,
            always_adapt=self.always_adapt,
        )


class _CountedLamb(timm.optim.Lamb):  # type: ignore[misc]
    """timm's LAMB; the count of updates, which it keeps in a group, is in the state of each parameter too."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            counts = [self.state[p]["step"] for p in group["params"] if "step" in self.state.get(p, {})]
            group["step"] = torch.tensor(float(counts[0]) if counts else 0.0)
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter]["step"] = torch.tensor(float(group["step"]))
        return loss
