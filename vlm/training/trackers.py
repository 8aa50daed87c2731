"""What accelerate's trackers do not take through their common interface."""

from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator


def log_cosine_histogram(accelerator: Accelerator, name: str, counts: Sequence[int], step: int) -> None:
    """A histogram of cosines in equal bins from -1 to 1, for tensorboard where it runs (other trackers: nothing)."""
    writers = [tracker.writer for tracker in accelerator.trackers if tracker.name == "tensorboard"]
    edges = np.linspace(-1, 1, len(counts) + 1)
    middles, weights = (edges[:-1] + edges[1:]) / 2, np.asarray(counts)
    for writer in writers:
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
