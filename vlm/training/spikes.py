"""Spikes: steps whose loss or gradient norm stands out from those before, by figures that all ranks have alike."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from vlm.checkpoint.manifest import SpikeRecord
from vlm.config import Config

Figure = Literal["loss", "grad_norm"]

_DEVIATION = 1.4826  # of a normal distribution, in medians of absolute deviations
_LEAST_DEVIATION = 0.01  # of the median: figures that hardly move are no reason to call a hundredth a spike


class GuardConfig(Config):
    """What is a spike of the loss or of the gradient's norm, and what is done about it."""

    action: Literal["leave_out", "roll_back"] = Field(
        default="leave_out",
        description="leave_out: the step changes nothing; roll_back: and what the steps before it changed is undone",
    )
    figures: tuple[Figure, ...] = Field(
        default=("loss", "grad_norm"), min_length=1, description="what is watched: loss, grad_norm"
    )
    z: float = Field(
        default=10.0, ge=2, le=1e6, description="a spike lies so many deviations above the median of the window"
    )
    window: int = Field(
        default=100, ge=3, le=100_000, description="usual steps that one is compared with; none is judged before"
    )
    steps_back: int = Field(
        default=100, gt=0, le=10**9, description="roll_back: at least so many steps, up to the spike, are undone"
    )
    most: int = Field(default=5, gt=0, le=1_000_000, description="the run ends when one more spike comes ...")
    within: int = Field(default=1_000, gt=0, le=10**9, description="... within so many steps")


@dataclass(frozen=True)
class Spike:
    """A figure that stood out: its value, and the median and the limit at the time."""

    figure: Figure
    value: float
    median: float
    limit: float

    @property
    def words(self) -> str:
        """The spike in words."""
        name = "the loss" if self.figure == "loss" else "the gradient's norm"
        return f"{name} is {self.value:.4g}, above {self.limit:.4g} (median {self.median:.4g})"


def limit_of(values: Sequence[float], z: float) -> tuple[float, float]:
    """The median of `values`, and what is above it by `z` deviations: 1.4826 median absolute deviations each."""
    median = float(np.median(values))
    deviation = _DEVIATION * float(np.median(np.abs(np.asarray(values) - median)))
    return median, median + z * max(deviation, _LEAST_DEVIATION * abs(median))


class SpikeWatch:
    """The windows of a run's loss and gradient norm, which usual steps fill; it judges a step before its update.

    All that it is told must be the same on all ranks: then they judge alike, without a word.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._windows: dict[Figure, deque[float]] = {}
        self.restore(None)

    def restore(self, record: SpikeRecord | None) -> None:
        """Go on from the windows of a checkpoint; None: from none."""
        stored: dict[Figure, Sequence[float]] = {"loss": (), "grad_norm": ()}
        if record is not None:
            stored = {"loss": record.losses, "grad_norm": record.norms}
        self._windows = {figure: deque(values, self.config.window) for figure, values in stored.items()}

    def record(self) -> SpikeRecord:
        """The windows, for a checkpoint."""
        return SpikeRecord(losses=tuple(self._windows["loss"]), norms=tuple(self._windows["grad_norm"]))

    def most_norm(self, loss: float) -> float:
        """The largest norm with which a step of this loss is taken; none is small enough where the loss stands out."""
        if self._spike("loss", loss) is not None:
            return -1.0
        return math.inf if (limit := self._limit("grad_norm")) is None else limit[1]

    def judge(self, loss: float, norm: float) -> Spike | None:
        """The spike that a step is. A usual step is remembered; one without finite figures is for others to judge."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return None
        spike = self._spike("loss", loss) or self._spike("grad_norm", norm)
        if spike is None:
            self._windows["loss"].append(loss)
            self._windows["grad_norm"].append(norm)
        return spike

    def _limit(self, figure: Figure) -> tuple[float, float] | None:
        values = self._windows[figure]
        if figure not in self.config.figures or len(values) < self.config.window:
            return None
        return limit_of(values, self.config.z)

    def _spike(self, figure: Figure, value: float) -> Spike | None:
        limit = self._limit(figure)
        return None if limit is None or not value > limit[1] else Spike(figure, value, *limit)
