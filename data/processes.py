"""Work shared among processes that end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from types import TracebackType
from typing import TypeVar

from vlm.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_AHEAD_PER_WORKER = 4


class WorkerPool:
    """`workers` processes (default: one a core), from the first job on; with 1, or one job, this one does the work.

    A context manager: leaving it drops the jobs that have not begun, and ends the processes. Jobs are drawn only as
    fast as they are worked off, and at most four results a process are held.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = num_cores() if workers is None else workers
        self._processes: ProcessPoolExecutor | None = None

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)

    def in_order(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """`work(job)` for every job, in the order of the jobs.

        Raises:
            UserError: a process was killed from outside.
        """
        alone, left = self._is_for_one(jobs)
        if alone:
            yield from map(work, left)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            waiting.extend(self._submit(work, islice(left, self._workers * _AHEAD_PER_WORKER)))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(self._submit(work, islice(left, 1)))
                yield result
        except BrokenProcessPool as error:
            raise _killed() from error

    def as_done(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """`work(job)` for every job, as they are done. Raises as `in_order`."""
        alone, left = self._is_for_one(jobs)
        if alone:
            yield from map(work, left)
            return
        try:
            waiting = set(self._submit(work, islice(left, self._workers * _AHEAD_PER_WORKER)))
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting.update(self._submit(work, islice(left, len(done))))
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise _killed() from error

    def _is_for_one(self, jobs: Iterable[Job]) -> tuple[bool, Iterator[Job]]:
        """Whether this process does the jobs itself (starting another takes longer than most single jobs); the jobs."""
        left = iter(jobs)
        first = list(islice(left, 2))
        return self._workers <= 1 or (len(first) < 2 and self._processes is None), chain(first, left)

    def _submit(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Future[Result]]:
        if self._processes is None:
            # Spawned, not forked: the caller may hold threads (polars, torch) that a child would inherit in mid-step.
            spawned = multiprocessing.get_context("spawn")
            self._processes = ProcessPoolExecutor(self._workers, spawned, initializer=_die_with_parent)
        return [self._processes.submit(work, job) for job in jobs]


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _killed() -> UserError:
    return UserError("a process was killed, perhaps for want of memory; start the same command again to go on")


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
