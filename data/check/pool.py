"""Work shared among processes: jobs in, results out in the order of the jobs, few of them waiting at a time."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from types import TracebackType
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

_AHEAD_PER_WORKER = 4


class WorkerPool:
    """`workers` processes (default: one a core; with 1 all work is done in this one), from the first job on.

    A context manager: leaving it drops the jobs that have not begun, and ends the processes.
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
        """`work(job)` for every job, in order; at most four results a process are held."""
        if self._workers <= 1:
            yield from map(work, jobs)
            return
        processes = self._started()
        left = iter(jobs)
        ahead = islice(left, self._workers * _AHEAD_PER_WORKER)
        waiting: deque[Future[Result]] = deque(processes.submit(work, job) for job in ahead)
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(processes.submit(work, job) for job in islice(left, 1))
            yield result

    def _started(self) -> ProcessPoolExecutor:
        if self._processes is None:
            # Spawned, not forked: the caller may hold threads (polars, torch) that a child would inherit in mid-step.
            spawned = multiprocessing.get_context("spawn")
            self._processes = ProcessPoolExecutor(self._workers, spawned, initializer=_die_with_parent)
        return self._processes


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _die_with_parent() -> None:
    """End this worker when the process that started it is killed: no orphan goes on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
