"""A teacher: an average of the weights that embeds the batch beside the model (MoCo: He et al., 2020; ALBEF)."""

import torch
from pydantic import Field

from vlm.batch import Batch
from vlm.config import Config
from vlm.encoded import Encoded
from vlm.training.ema import Ema, EmaConfig
from vlm.training.engine import Engine


class TeacherConfig(Config):
    """The teacher that some terms and providers learn from; it exists when one of them asks for it."""

    decay: float = Field(default=0.995, ge=0, le=1, description="share of the old weights kept at each step")


class Teacher:
    """Embeds batches with averaged weights, without graph and without dropout. Under ZeRO-3 it keeps shards."""

    def __init__(self, config: TeacherConfig, engine: Engine) -> None:
        self.average = Ema(EmaConfig.model_construct(decay=config.decay, ramp=False), engine)
        self._engine = engine

    @torch.no_grad()
    def embed(self, batch: Batch, parts: list[tuple[int, int]], *, captions: bool = False) -> Encoded:
        """The teacher's embeddings of this rank's rows, micro-batch by micro-batch. Collective."""
        module = self._engine.module
        training = module.training
        with self._engine.holding(self.average.shards):
            module.eval()
            found = [
                (self._engine.encode(part, captions=captions), filled) for part, filled in micro_batches(batch, parts)
            ]
            module.train(training)
        kept = [encoded for encoded, filled in found if filled]
        return Encoded(
            torch.cat([encoded.image for encoded in kept]),
            torch.cat([encoded.text for encoded in kept]),
            kept[0].logit_scale,
            kept[0].logit_bias,
            captions=torch.cat([e.captions for e in kept if e.captions is not None]) if captions else None,
        )

    def update(self, step: int) -> None:
        """Follow the weights after step `step`."""
        self.average.update(step)


def micro_batches(batch: Batch, parts: list[tuple[int, int]]) -> list[tuple[Batch, bool]]:
    """The batch in pieces, and whether each has rows of its own: an empty one borrows a row, for ranks keep in step."""
    if len(parts) == 1:
        return [(batch, True)]
    return [(batch.part(start, stop) if stop > start else batch.part(0, 1), stop > start) for start, stop in parts]
