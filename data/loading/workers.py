"""Loading processes: numbered pieces of work in, their results in order out, and no waiting for ever."""

import mmap
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from data.loading.crew import Crew, WorkerDiedError
from vlm.activity import awaiting
from vlm.errors import UserError
from vlm.terminal import one_line

Sent = TypeVar("Sent")
Loaded = TypeVar("Loaded")

_TEXT = 512  # bytes of a worker's line in the table of statuses
_POLL_SECONDS = 5.0
_WARN_SECONDS = 60.0


class StatusTable:
    """Status lines of the workers, in memory that the training process can read while the worker hangs."""

    def __init__(self, workers: int) -> None:
        self.num_workers = workers
        self._table = mmap.mmap(-1, _TEXT * max(1, workers))

    def write(self, worker: int, text: str) -> None:
        """Set the status of a worker."""
        line = text.encode("utf-8", "replace")[-(_TEXT - 1) :]
        self._table[worker * _TEXT : worker * _TEXT + len(line) + 1] = line + b"\0"

    def read(self, worker: int) -> str:
        """The last status of a worker."""
        stored = self._table[worker * _TEXT : (worker + 1) * _TEXT]
        return stored.partition(b"\0")[0].decode("utf-8", "replace") or "nothing yet"


class WorkerInfo:
    """This process among those that load for a rank: its number, and where it sets its status."""

    def __init__(self, statuses: StatusTable, worker: int = 0) -> None:
        self._statuses = statuses
        self.number = worker
        self.is_first = worker == 0
        self.stride = max(1, statuses.num_workers)

    def set_status(self, text: str) -> None:
        """Note what is being done, for whoever waits for it."""
        self._statuses.write(self.number, text)


def _as_sent(value: Any) -> Any:
    return value


def load_ahead(
    load: Callable[[int, WorkerInfo], Sent],
    numbers: range,
    *,
    workers: int,
    prefetch: int = 2,
    arrive: Callable[[Sent], Loaded] = _as_sent,
    pinned: bool = False,
    patience: float = 1800.0,
) -> Generator[Loaded, None, None]:
    """`load(n, worker)` for each of `numbers`, in order, computed ahead in `workers` processes (0: here, when asked).

    Workers are forked, one thread each; they take the numbers in turn. Nothing is drawn from this process's random
    generators. Leaving the iterator ends the workers. One that is waited for is named, with the shard it is reading,
    after a minute on standard error, and after `patience` seconds in the error. `arrive` is done to each result in
    this process, and what it returns is copied to pinned memory, by its `pin_memory`, where that is asked for.

    Raises:
        UserError: as `load` raised it, in whichever process; or a worker died, or kept this process waiting too long.
    """
    statuses = StatusTable(workers)
    if workers == 0:
        worker = WorkerInfo(statuses)
        results = (load(number, worker) for number in numbers)
        yield from _arriving(results, arrive, pinned)
        return
    crew = Crew(lambda worker, number: load(number, WorkerInfo(statuses, worker)), workers)
    try:
        arriving = _arriving(_in_turn(crew, numbers, workers, prefetch, statuses, patience), arrive, pinned)
        yield from _pinned_ahead(arriving, prefetch) if pinned else arriving
    finally:
        crew.close()


def _in_turn(
    crew: Crew, numbers: range, workers: int, prefetch: int, statuses: StatusTable, patience: float
) -> Iterator[Any]:
    """The results in order; each worker is asked for `prefetch` more than it has delivered."""
    ahead = workers * prefetch
    place = 0
    try:
        for first, number in enumerate(numbers[:ahead]):
            crew.send(first % workers, number)
        for place in range(len(numbers)):
            worker = place % workers
            with awaiting(partial(_awaited, worker, crew, statuses)):
                result = crew.receive(worker, _Watchdog(worker, statuses, patience))
            if place + ahead < len(numbers):
                crew.send(place % workers, numbers[place + ahead])
            yield result
    except WorkerDiedError:
        worker = place % workers
        message = f"loading worker {worker} died (killed? out of memory?) at {statuses.read(worker)}"
        raise UserError(message) from None


def _awaited(worker: int, crew: Crew, statuses: StatusTable) -> str:
    return f"loading worker {worker} (process {crew.process(worker)}), which is at {statuses.read(worker)}"


class _Watchdog:
    """Watch over the wait for one result: says who is waited for after a minute, raises after `patience` seconds."""

    def __init__(self, worker: int, statuses: StatusTable, patience: float) -> None:
        self._worker = worker
        self._statuses = statuses
        self._patience = patience
        self._began = time.monotonic()
        self._warned = False

    def __call__(self) -> float:
        waited, worker = time.monotonic() - self._began, self._worker
        if waited >= self._patience:
            doing = self._statuses.read(worker)
            raise UserError(
                f"loading worker {worker} kept this rank waiting for {waited:.0f} s (data.patience) at {doing}"
            )
        if waited >= _WARN_SECONDS and not self._warned:
            self._warned = True
            doing = self._statuses.read(worker)
            line = f"waiting for loading worker {worker} for {waited:.0f} s: {doing}"
            print(one_line(line), file=sys.stderr)  # noqa: T201
        return min(_POLL_SECONDS, self._patience - waited)


def _arriving(results: Iterator[Sent], arrive: Callable[[Sent], Loaded], pinned: bool) -> Iterator[Loaded]:
    for result in results:
        arrived: Any = arrive(result)
        yield arrived.pin_memory() if pinned else arrived


def _pinned_ahead(arriving: Iterator[Loaded], ahead: int) -> Iterator[Loaded]:
    """The same, received and copied by a thread, so that a step does not wait for the copy."""
    ready: queue.Queue[tuple[Loaded | None, BaseException | None]] = queue.Queue(ahead)
    left = threading.Event()

    def put(entry: tuple[Loaded | None, BaseException | None]) -> None:
        while not left.is_set():
            with suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return

    def receive() -> None:
        try:
            for result in arriving:
                put((result, None))
                if left.is_set():
                    return
        except BaseException as error:
            put((None, error))
        else:
            put((None, None))

    threading.Thread(target=receive, daemon=True, name="pin").start()
    try:
        while True:
            result, error = ready.get()
            if error is not None:
                raise error
            if result is None:
                return
            yield result
    finally:
        left.set()
