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


class PoisonedGradient(PairTerm):
    """Adds 0 to the loss, whose gradient is NaN in some steps."""

    steps: tuple[int, ...]

    def __call__(self, step: PairStep) -> Tensor:
        nothing = step.pairs.mean(0.0 * step.pairs.x.sum(1))
        spoiled: Tensor = _Spoiled.apply(nothing, torch.nan if step.step in self.steps else 1.0)
        return spoiled


class Spike(PairTerm):
    """Adds `loss` to the loss of some steps, and `slope` to the gradient at every number of x; to others 0."""

    steps: tuple[int, ...]
    rank: int = 0
    loss: float = 0.0
    slope: float = 0.0

    def __call__(self, step: PairStep) -> Tensor:
        is_now = step.step in self.steps and step.exchange.world.rank == self.rank
        x = step.pairs.x
        rows = (self.slope if is_now else 0.0) * (x - x.detach()).sum(1)
        return step.pairs.mean(rows) + (self.loss if is_now else 0.0)


class Hungry(PairTerm):
    """Adds 0 to the loss, and asks for a tensor of so many bytes in some steps, on one rank."""

    steps: tuple[int, ...]
    rank: int = 0
    bytes: int = 2**40

    def __call__(self, step: PairStep) -> Tensor:
        if step.step in self.steps and step.exchange.world.rank == self.rank:
            torch.empty(self.bytes, dtype=torch.uint8)
        return step.pairs.mean(0.0 * step.pairs.x.sum(1))


class _Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
