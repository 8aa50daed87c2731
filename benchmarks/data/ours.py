"""This system's training stream, timed in a process of its own, which `benchmarks.data.throughput` starts and asks."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from open_clip.tokenizer import SimpleTokenizer

from benchmarks.data.stages import quality, stages
from benchmarks.processes import Clock, serve
from data.config import DataConfig
from data.loading.stream import TrainStream
from vlm.distributed.world import World
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import Tokenizer

FAR = 10**6  # steps: a measurement ends before
SETTLING_SECONDS = 2.0


@contextmanager
def stream(folder: str, size: int, batch: int, workers: int) -> Iterator[TrainStream]:
    """The stream with everything on that a training run has on."""
    config = DataConfig.model_validate({"sources": {"photographs": {"shards": f"{folder}/*.tar"}}, "workers": workers})
    tokenizer = Tokenizer(SimpleTokenizer(), shorten=True)
    with tempfile.TemporaryDirectory() as run:
        yield TrainStream(
            config, ImageSpec(size=size), tokenizer, global_batch=batch, seed=0, world=World(), record=Path(run)
        )


def throughput(folder: str, size: int, batch: int, batches: int, workers: int) -> dict[str, float]:
    """Seconds (`wall`, `cpu`) from the arrival of the first batch to that of the last of `batches` more."""
    with stream(folder, size, batch, workers) as data:
        arriving = data.batches(0, FAR)
        next(arriving)
        clock = Clock()
        for _ in range(batches):
            images = next(arriving).pixels
            assert images.shape == (batch, 3, size, size)
            assert images.dtype == torch.uint8
        return clock.seconds()


def memory(folder: str, size: int, batch: int, epochs: int) -> list[dict[str, float]]:
    """MB that one worker holds (USS: alone; PSS: and its share of the rest) after each epoch, while it waits."""
    held = []
    with stream(folder, size, batch, 1) as data:
        arriving = data.batches(0, FAR)
        for _ in range(epochs):
            for _ in range(data.num_samples // batch):
                next(arriving)
            time.sleep(SETTLING_SECONDS)
            (worker,) = psutil.Process().children()
            now = worker.memory_full_info()
            held.append({"uss": now.uss / 1e6, "pss": now.pss / 1e6})
    return held


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"throughput": throughput, "memory": memory, "stages": stages, "quality": quality})
