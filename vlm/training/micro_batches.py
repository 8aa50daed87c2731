"""Micro-batches: how a rank's samples of a global batch are cut, so that every rank runs as many forwards."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from vlm.batch import Batch


class MicroBatch(NamedTuple):
    """Samples that go through the towers together. One without rows of its own borrows one: ranks keep in step."""

    number: int
    batch: Batch
    has_rows: bool


@dataclass(frozen=True)
class MicroBatchPlan:
    """How many samples of one rank go through the towers together; `rows` None: all of them."""

    global_batch: int
    world_size: int
    rows: int | None = None

    @property
    def count(self) -> int:
        """Forwards a step and rank."""
        fullest = math.ceil(self.global_batch / self.world_size)
        return 1 if self.rows is None else math.ceil(fullest / self.rows)

    def bounds(self, num_rows: int) -> list[tuple[int, int]]:
        """Where each micro-batch of `num_rows` samples starts and stops; where rows are few, some are empty."""
        return [
            (num_rows * number // self.count, num_rows * (number + 1) // self.count) for number in range(self.count)
        ]

    def of(self, batch: Batch) -> list[MicroBatch]:
        """The micro-batches of a rank's samples."""
        if self.count == 1:
            return [MicroBatch(0, batch, has_rows=True)]
        return [
            MicroBatch(number, batch.take(start, stop) if stop > start else batch.take(0, 1), stop > start)
            for number, (start, stop) in enumerate(self.bounds(len(batch)))
        ]
