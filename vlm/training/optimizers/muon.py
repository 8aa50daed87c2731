"""Muon for the matrices within blocks, beside AdamW for all else."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from vlm.training.engines.options import Layout
from vlm.training.optimizers.base import OPTIMIZERS, Moment, OptimizerConfig
from vlm.training.optimizers.parameters import ParameterFacts
from vlm.training.optimizers.wholes import OnWholes


@OPTIMIZERS.register("muon")
class Muon(OptimizerConfig):
    """Muon (Jordan et al., 2024) as torch has it, for matrices within blocks of towers and decoder; AdamW for the rest.

    The rest are embeddings of patches, tokens and positions, projections, heads, norms, biases and scale. Steps of
    Muon have the size that AdamW's usually have (0.2 times the root of the larger dimension: Liu et al., 2025), so
    that one rate, one schedule and one weight decay serve both.
    """

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    layouts: ClassVar[frozenset[Layout]] = frozenset({"whole", "rows"})
    communicates: ClassVar[bool] = True
    separates_hidden: ClassVar[bool] = True

    kind: Literal["muon"] = Field(description="orthogonal steps for matrices within blocks, AdamW's for the rest")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="of Muon: decay of the mean of gradients")
    nesterov: bool = Field(default=True, description="of Muon: look ahead along the momentum")
    iterations: int = Field(default=5, ge=1, le=99, description="of Muon: Newton-Schulz steps towards orthogonality")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of AdamW: decay of the mean of gradients")
    beta2: float = Field(default=0.98, ge=0, lt=1, description="of AdamW: decay of the mean of their squares")
    eps: float = Field(default=1e-6, gt=0, le=1, description="of AdamW: added to the root of that mean")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:  # noqa: D102
        hidden = [group for group in groups if group["hidden"]]
        rest = [group for group in groups if not group["hidden"]]
        optimizers: list[torch.optim.Optimizer] = []
        if hidden:
            optimizers.append(
                _Muon(
                    hidden,
                    lr=self.lr,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    ns_steps=self.iterations,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if rest:
            optimizers.append(
                torch.optim.AdamW(rest, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)
            )
        return SideBySide(optimizers)

    def moments_of(self, parameter: ParameterFacts) -> Mapping[str, Moment]:  # noqa: D102
        names = ("momentum_buffer",) if parameter.hidden else ("exp_avg", "exp_avg_sq")
        return {name: Moment(parameter.shape) for name in names}


class _Muon(OnWholes, torch.optim.Muon):
    on_wholes = torch.optim.Muon


class SideBySide(torch.optim.Optimizer):
    """Several optimizers, each of groups of its own, as one: with all their groups, and one state."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__(groups, {})
        self.optimizers = optimizers
        self.param_groups = groups  # theirs, not copies: a rate that is set here is theirs
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A step of each; the loss, where `closure` computes one."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
