"""A teacher: an average of the weights that embeds the batch beside the model (MoCo: He et al., 2020; ALBEF)."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.training.ema import Ema, EmaConfig
from vlm.training.engines.base import Engine
from vlm.training.micro_batches import MicroBatch


class TeacherConfig(Config):
    """The teacher that some terms and providers learn from; it exists when one of them asks for it."""

    decay: float = Field(default=0.995, ge=0, le=1, description="share of the old weights kept at each step")


class Teacher:
    """A model with averaged weights, without graph and without dropout. Under ZeRO-3 it keeps shards."""

    def __init__(self, config: TeacherConfig, engine: Engine) -> None:
        self.average = Ema(EmaConfig.model_construct(decay=config.decay, ramp=False), engine)
        self._engine = engine

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[MicroBatch], outputs: frozenset[str]) -> list[dict[str, Tensor]]:
        """The averaged weights' outputs of these names for each micro-batch. Collective."""
        module = self._engine.module
        training = module.training
        with self._engine.swapped_weights(self.average.shards):
            module.eval()
            made = [self._engine.forward(micro_batch.batch, outputs) for micro_batch in micro_batches]
            module.train(training)
        return made

    def update(self, step: int) -> None:
        """Follow the weights after step `step`."""
        self.average.update(step)
