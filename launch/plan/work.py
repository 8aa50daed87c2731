"""The work of a micro-batch of any size, from the traces of two small ones: what it takes grows with its rows."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launch.plan.trace import Phase, Trace

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Operation by operation: FLOPs, and bytes read and written."""

    flops: Numbers
    moved: Numbers

    @property
    def total_flops(self) -> float:
        """FLOPs of all operations."""
        return float(self.flops.sum())


@dataclass(frozen=True)
class Held:
    """Moment by moment: bytes of finished gradients, and of all else that a micro-batch allocated."""

    gradients: Numbers
    others: Numbers
    finished: Numbers

    def peak(self, gradient_share: float, passing: float, bucket: float) -> tuple[float, float]:
        """Gradients and others at the moment when they are most together.

        This share of the gradients stays; each takes `passing` times its size when it is finished, and once more where
        it is larger than a bucket.
        """
        gradients = gradient_share * self.gradients
        gradients = gradients + self.finished * np.where(self.finished > bucket, 2 * passing, passing)
        at = int((gradients + self.others).argmax())
        return float(gradients[at]), float(self.others[at])


class Work:
    """What a micro-batch of so many rows computes and holds; between and beyond the traced ones by a straight line."""

    def __init__(self, small: Trace, large: Trace) -> None:
        self._small, self._large = small, large

    def costs(self, phase: str, rows: float) -> Costs:
        """The operations of a phase: forward or backward."""
        small, large = self._phases(phase)
        return Costs(self._at(small.flops, large.flops, rows), self._at(small.moved, large.moved, rows))

    def held(self, phase: str, rows: float) -> Held:
        """What is alive during a phase."""
        small, large = self._phases(phase)
        others = self._at(small.others, large.others, rows)
        return Held(np.asarray(large.gradients), others, np.asarray(large.finished))

    def kept(self, rows: float) -> Mapping[str, float]:
        """Bytes that the graph holds between forward and backward, by part of the model."""
        return {
            part: float(self._at([self._small.kept[part]], [size], rows)[0]) for part, size in self._large.kept.items()
        }

    def _phases(self, phase: str) -> tuple[Phase, Phase]:
        return getattr(self._small, phase), getattr(self._large, phase)

    def _at(self, small: list[float], large: list[float], rows: float) -> Numbers:
        first, second = np.asarray(small, np.float64), np.asarray(large, np.float64)
        share = (rows - self._small.rows) / (self._large.rows - self._small.rows)
        if len(first) == len(second):
            return np.maximum(first + share * (second - first), 0.0)
        # Some loops go round oftener with more rows: then what all operations take together grows by a line.
        wanted, known = first.sum() + share * (second.sum() - first.sum()), second.sum()
        return second * (max(wanted, 0.0) / known if known else 1.0)
