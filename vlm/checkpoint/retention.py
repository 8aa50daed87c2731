"""Which of a run's checkpoints are kept: a function of their steps and of measured figures, of no clock."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from vlm.config import Config
from vlm.duration import PositiveDuration


class KeepConfig(Config):
    """Which checkpoints are kept: all that one of the keys names."""

    last: int = Field(default=2, gt=0, le=10**6, description="the newest so many")
    every: PositiveDuration | None = Field(
        default=None, description="the first regular one at or after each multiple of this; null: none"
    )
    best: dict[str, Annotated[int, Field(gt=0, le=10**6)]] = Field(
        default={}, description="eval/EVALUATION/METRIC: how many of the best by this figure, measured at their step"
    )

    @property
    def most(self) -> int:
        """How many are kept at most, but for those of `every`, which become more as long as the run goes."""
        return self.last + sum(self.best.values())


@dataclass(frozen=True)
class Best:
    """The best checkpoints by a figure: how many, and whether a higher value is better."""

    metric: str
    count: int
    higher: bool

    def among(self, saved: Sequence[int], values: Mapping[int, float]) -> set[int]:
        """The best of the steps with a checkpoint by their values; of equal ones the newer. NaN is no value."""
        known = [step for step in saved if math.isfinite(values.get(step, math.nan))]
        sign = 1 if self.higher else -1
        return set(sorted(known, key=lambda step: (sign * values[step], step))[-self.count :])


@dataclass(frozen=True)
class Retention:
    """What is kept, in steps. `every_steps` (None: none) are multiples; a regular checkpoint is one of `regular`."""

    last: int
    regular: int
    every_steps: int | None = None
    best: tuple[Best, ...] = ()

    def kept(self, saved: Sequence[int], figures: Mapping[str, Mapping[int, float]]) -> set[int]:
        """Those of the steps with a checkpoint that are kept; `figures` are the values of each metric by step."""
        kept = set(sorted(saved)[-self.last :])
        if self.every_steps is not None:
            kept |= {step for step in saved if step % self.regular == 0 and step % self.every_steps < self.regular}
        for best in self.best:
            kept |= best.among(saved, figures.get(best.metric, {}))
        return kept
