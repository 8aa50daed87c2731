"""An exponential moving average of the weights, kept in the layout of the engine's shards."""

import torch
from pydantic import Field
from torch import Tensor

from vlm.checkpoint.parts import Saved
from vlm.config import Config
from vlm.training.engines.base import Engine


class EmaConfig(Config):
    """Average of the weights over the run; evaluations and exports use it when it is on."""

    decay: float = Field(default=0.9998, gt=0, lt=1, description="share of the old average kept at each step")
    ramp: bool = Field(default=True, description="start with a smaller decay: min(decay, (1 + step) / (10 + step))")


class Ema:
    """The average of each trainable parameter. Under ZeRO-3 a rank averages its own shards only."""

    def __init__(self, config: EmaConfig, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        self.shards: dict[str, Tensor] = {name: engine.shard(name).clone() for name in engine.parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after step `step` (counted from 0)."""
        decay = min(self._config.decay, (1 + step) / (10 + step)) if self._config.ramp else self._config.decay
        averages = list(self.shards.values())
        weights = [self._engine.shard(name) for name in self.shards]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def full(self, name: str) -> Tensor:
        """The average of one parameter, whole. Collective."""
        return self._engine.to_full(name, self.shards[name])

    def saved(self, name: str) -> Saved:
        """What this rank writes of the average of one parameter. Collective."""
        return self._engine.saved_shard(name, self.shards[name])

    def load(self, name: str, value: Tensor) -> None:
        """Replace the average of one parameter by a whole tensor. Collective."""
        self.shards[name].copy_(self._engine.to_shard(name, value))
