"""Trackers that draw a run's figures, as accelerate started them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker


class Trackers:
    """The trackers of a run; on ranks that track nothing there are none."""

    def __init__(self, trackers: Sequence[GeneralTracker] = ()) -> None:
        self._trackers = trackers

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Give figures after a step to all trackers, tables left out; a list of counts is a histogram of cosines."""
        numbers = {key: value for key, value in figures.items() if not isinstance(value, list | dict)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)
            if tracker.name == "tensorboard":
                for key, counts in figures.items():
                    if isinstance(counts, list):
                        _log_cosine_histogram(tracker.writer, key, counts, step)


def _log_cosine_histogram(writer: Any, name: str, counts: Sequence[int], step: int) -> None:
    """A histogram of cosines in equal bins from -1 to 1, which trackers do not take through their common interface."""
    edges = np.linspace(-1, 1, len(counts) + 1)
    middles, weights = (edges[:-1] + edges[1:]) / 2, np.asarray(counts)
    writer.add_histogram_raw(
        name,
        min=-1.0,
        max=1.0,
        num=int(weights.sum()),
        sum=float(weights @ middles),
        sum_squares=float(weights @ middles**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=list(counts),
        global_step=step,
    )
