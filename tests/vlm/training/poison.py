"""A term that spoils chosen steps: its value, or its gradient only, on one rank or on all."""

from typing import Any, Literal

import torch
from torch import Tensor

from vlm.objectives.step import PairStep
from vlm.objectives.term import PairTerm


class Poison(PairTerm):
    """Adds 0 to the loss of most steps."""

    steps: tuple[int, ...]
    rank: int = 0
    kind: Literal["nan", "inf", "gradient", "-inf", "infinite gradient"] = "nan"

    def __call__(self, step: PairStep) -> Tensor:
        nothing = step.pairs.mean(0.0 * step.pairs.x.sum(1))
        if step.step not in self.steps or step.exchange.world.rank != self.rank:
            return nothing
        if "gradient" in self.kind:
            factor: Tensor = _Spoiled.apply(nothing, torch.nan if self.kind == "gradient" else torch.inf)
            return factor
        return nothing + float(self.kind)


class _Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
