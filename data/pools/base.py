"""Work shared among processes, wherever they run: results in order or as they are done, few of them held."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import TypeVar

from vlm.registry import Registry

Job = TypeVar("Job")
Result = TypeVar("Result")

_AHEAD_PER_WORKER = 4


@dataclass(frozen=True)
class PoolOptions:
    """What a pool on several machines is asked for; None leaves the choice to it.

    `workers` are processes at most, `address` is that of a Ray cluster, `sbatch` are further options of sbatch, and
    `gpu` says whether each worker needs one where there are any.
    """

    workers: int | None = None
    address: str | None = None
    sbatch: tuple[str, ...] = ()
    gpu: bool = False


class Pool(ABC):
    """Processes that work off jobs; leaving the block ends those that it started and drops the jobs not yet begun.

    A job and its work are pickled, the work by the name of its module. Jobs are drawn only as fast as they are worked
    off, and at most four results a process are held.
    """

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    @abstractmethod
    def start(cls, options: PoolOptions) -> "Pool":
        """A pool as asked for. Raises UserError where there is none to be had."""

    @abstractmethod
    def close(self) -> None:
        """End the processes; jobs that have not begun are dropped."""

    @abstractmethod
    def submit(self, work: Callable[[Job], Result], job: Job) -> "Future[Result]":
        """`work(job)` in some process, soon."""

    @abstractmethod
    def num_workers(self) -> int:
        """The processes that work off jobs now, or will soon."""

    def in_order(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """`work(job)` for every job, in the order of the jobs. Raises what the work raises."""
        left = iter(jobs)
        waiting = deque(self._submit(work, left, self._num_ahead()))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(self._submit(work, left, max(1, self._num_ahead() - len(waiting))))
            yield result

    def as_done(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """`work(job)` for every job, as they are done. Raises what the work raises."""
        left = iter(jobs)
        waiting = set(self._submit(work, left, self._num_ahead()))
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting.update(self._submit(work, left, max(len(done), self._num_ahead() - len(waiting))))
            yield from (future.result() for future in done)

    def _num_ahead(self) -> int:
        return self.num_workers() * _AHEAD_PER_WORKER

    def _submit(self, work: Callable[[Job], Result], jobs: Iterator[Job], most: int) -> "list[Future[Result]]":
        return [self.submit(work, job) for job in islice(jobs, most)]


Workers = int | Pool | None
"""Who shares some work: so many processes of this machine (None: one a core), or a pool that is open already."""


class Lent(AbstractContextManager[Pool]):
    """A pool that somebody else closes."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __enter__(self) -> Pool:
        return self._pool

    def __exit__(self, *error: object) -> None:
        return


POOLS: Registry[type[Pool]] = Registry("place to work", Pool)
POOLS.register_place("local", "data.pools.local:LocalPool")
POOLS.register_place("ray", "data.pools.ray:RayPool")
POOLS.register_place("slurm", "data.pools.slurm:SlurmPool")
