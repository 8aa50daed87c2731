"""The rates of a run between two lines of its log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vlm.activity import phase
from vlm.batch import Batch


class Clock:
    """Rates since the last lap: samples a second, and the share of the time that training waited for data."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self._began = time.perf_counter()
        self._step: int | None = None
        self._waited = 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, the waiting for them noted; the clock runs from here."""
        self._began = time.perf_counter()
        while True:
            began_waiting = time.perf_counter()
            with phase("data"):
                batch = next(batches, None)
            if batch is None:
                return
            if self._step is None:
                self._step = batch.step
            self._waited += time.perf_counter() - began_waiting
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the block off the clock."""
        stopped = time.perf_counter()
        yield
        self._began += time.perf_counter() - stopped

    def lap(self, step: int) -> tuple[float, float]:
        """Samples a second and the share of data waits since the last lap."""
        now = time.perf_counter()
        passed = max(now - self._began, 1e-9)
        rate = (step - (self._step or 0)) * self._global_batch / passed
        waiting_fraction = min(1.0, self._waited / passed)
        self._began, self._step, self._waited = now, step, 0.0
        return rate, waiting_fraction
