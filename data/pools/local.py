"""Work shared among processes of this machine that end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from itertools import chain, islice

from data.pools.base import Job, Lent, Pool, PoolOptions, Result, Workers
from vlm.errors import UserError


class LocalPool(Pool):
    """`workers` processes (default: one a core), from the first job on; with 1, or one job, this one does the work.

    A killed process ends the work with a UserError.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = num_cores() if workers is None else workers
        self._processes: ProcessPoolExecutor | None = None

    @classmethod
    def start(cls, options: PoolOptions) -> "LocalPool":
        """As of any pool."""
        return cls(options.workers)

    def close(self) -> None:
        """As of any pool."""
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)

    def num_workers(self) -> int:
        """The processes, started or not."""
        return self._workers

    def submit(self, work: Callable[[Job], Result], job: Job) -> "Future[Result]":
        """As of any pool; the first call starts the processes."""
        if self._processes is None:
            # Spawned, not forked: the caller may hold threads (polars, torch) that a child would inherit in mid-step.
            spawned = multiprocessing.get_context("spawn")
            self._processes = ProcessPoolExecutor(self._workers, spawned, initializer=_die_with_parent)
        return self._processes.submit(work, job)

    def in_order(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """As of any pool."""
        yield from self._shared(super().in_order, work, jobs)

    def as_done(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """As of any pool."""
        yield from self._shared(super().as_done, work, jobs)

    def _shared(
        self,
        share: Callable[[Callable[[Job], Result], Iterable[Job]], Iterator[Result]],
        work: Callable[[Job], Result],
        jobs: Iterable[Job],
    ) -> Iterator[Result]:
        left = iter(jobs)
        first = list(islice(left, 2))
        left = chain(first, left)
        # To start another process takes longer than most single jobs.
        if self._workers <= 1 or (len(first) < 2 and self._processes is None):
            yield from map(work, left)
            return
        try:
            yield from share(work, left)
        except BrokenProcessPool as error:
            raise UserError(
                "a process was killed, perhaps for want of memory; start the same command again to go on"
            ) from error


def open_pool(workers: Workers = None) -> AbstractContextManager[Pool]:
    """The pool of `workers`: one of this machine, closed at the end of the block, or the given one, left open."""
    return Lent(workers) if isinstance(workers, Pool) else LocalPool(workers)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _die_with_parent() -> None:
    """End this worker when the process that started it ends, and not before: no orphan goes on writing.

    What a terminal sends to all processes of a command is the first one's to answer.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
