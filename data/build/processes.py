"""Work spread over processes that end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from vlm.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Processes:
    """A pool of `workers` processes; one worker is this process itself."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """The results as they come, in any order; jobs are drawn only as fast as they are worked off.

        Raises:
            UserError: a process was killed from outside.
        """
        if self._workers == 1:
            yield from map(function, jobs)
            return
        if self._pool is None:
            # Spawned, not forked: the caller may hold threads (polars, torch) that a child would inherit in mid-step.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, initializer=_die_with_parent)
        try:
            yield from _bounded(self._pool, function, jobs, 2 * self._workers)
        except BrokenProcessPool as error:
            raise UserError(
                "a process was killed, perhaps for want of memory; the same command goes on from the finished shards"
            ) from error


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bounded(
    pool: ProcessPoolExecutor, function: Callable[[Job], Result], jobs: Iterable[Job], most: int
) -> Iterator[Result]:
    waiting: set[Future[Result]] = set()
    for job in jobs:
        waiting.add(pool.submit(function, job))
        if len(waiting) >= most:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _die_with_parent() -> None:
    """End this worker when the process that started it is killed: no orphan goes on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
