"""Loading processes: numbered pieces of work in, their results in order out, and no waiting for ever."""

import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vlm.errors import UserError

Loaded = TypeVar("Loaded", bound=tuple[object, ...])

_TEXT = 512  # bytes of a worker's place in the table of stages
_POLL_SECONDS = 5.0
_WARN_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


class Stages:
    """What each worker is doing, in memory that the training process can read while the worker hangs."""

    def __init__(self, workers: int) -> None:
        self.num_workers = workers
        self._table = mmap.mmap(-1, _TEXT * max(1, workers))

    def write(self, worker: int, text: str) -> None:
        """Say what a worker does now."""
        line = text.encode("utf-8", "replace")[-(_TEXT - 1) :]
        self._table[worker * _TEXT : worker * _TEXT + len(line) + 1] = line + b"\0"

    def read(self, worker: int) -> str:
        """What a worker said last."""
        stored = self._table[worker * _TEXT : (worker + 1) * _TEXT]
        return stored.partition(b"\0")[0].decode("utf-8", "replace") or "nothing yet"


class Stage:
    """The place of this process among those that load for a rank, and where it tells what it is doing."""

    def __init__(self, stages: Stages) -> None:
        info = get_worker_info()
        self._stages = stages
        self.worker = 0 if info is None else int(info.id)
        self.is_first = self.worker == 0
        self.stride = max(1, stages.num_workers)

    def tell(self, text: str) -> None:
        """Note what is being done, for whoever waits for it."""
        self._stages.write(self.worker, text)


class _Failure(str):
    """A user's error on its way from a worker: pickled exceptions would arrive as tracebacks."""


class _Numbered(Dataset[Loaded | _Failure], Generic[Loaded]):
    """Work by number, as a DataLoader wants it."""

    def __init__(self, load: Callable[[int, Stage], Loaded], stages: Stages) -> None:
        self._load = load
        self._stages = stages

    def __getitem__(self, number: int) -> Loaded | _Failure:
        try:
            return self._load(number, Stage(self._stages))
        except UserError as error:
            return _Failure(error)


def load_ahead(
    load: Callable[[int, Stage], Loaded],
    numbers: range,
    *,
    workers: int,
    prefetch: int = 2,
    pinned: bool = False,
    patience: float = 1800.0,
) -> Iterator[Loaded]:
    """`load(n, stage)` for each of `numbers`, in order, computed ahead in `workers` processes (0: here, when asked).

    Workers are forked, one thread each; they take the numbers in turn. Nothing is drawn from this process's random
    generators. Leaving the iterator ends the workers. One that is waited for is named, with the shard it is reading,
    after a minute on standard error, and after `patience` seconds in the error.

    Raises:
        UserError: as `load` raised it, in whichever process; or a worker died, or kept this process waiting too long.
    """
    stages = Stages(workers)
    loader = DataLoader(
        _Numbered(load, stages),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pinned,
        collate_fn=_as_loaded,
        worker_init_fn=_start_worker,
        timeout=min(_POLL_SECONDS, patience) if workers else 0,
        generator=torch.Generator(),  # else each iterator takes a number from the global generator
        multiprocessing_context="fork" if workers else None,
    )
    arriving = iter(loader)
    for place in range(len(numbers)):
        worker = place % workers if workers else 0
        loaded = _next(arriving, worker, stages, patience)
        if isinstance(loaded, _Failure):
            raise UserError(str(loaded))
        yield loaded


def _next(arriving: Iterator[Loaded | _Failure], worker: int, stages: Stages, patience: float) -> Loaded | _Failure:
    """The next result; DataLoader's time-outs are taken as occasions to look at the clock."""
    began, warned = time.monotonic(), False
    while True:
        try:
            return next(arriving)
        except RuntimeError as error:
            waited, doing = time.monotonic() - began, stages.read(worker)
            if "exited unexpectedly" in str(error):
                raise UserError(f"loading worker {worker} died (killed? out of memory?) at {doing}") from error
            if "timed out" not in str(error):
                raise
            if waited >= patience:
                raise UserError(
                    f"loading worker {worker} kept this rank waiting for {waited:.0f} s (data.patience) at {doing}"
                ) from error
            if waited >= _WARN_SECONDS and not warned:
                warned = True
                print(f"waiting for loading worker {worker} for {waited:.0f} s: {doing}", file=sys.stderr)  # noqa: T201


def _as_loaded(loaded: Loaded | _Failure) -> Loaded | _Failure:
    """DataLoader's own conversion would turn tuples into lists."""
    return loaded


def _start_worker(worker: int) -> None:  # noqa: ARG001 (DataLoader passes the number)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # an interrupt is the training process's to handle, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _die_with_parent()


def _die_with_parent() -> None:
    """End this worker at once when the training process is killed (Linux; elsewhere torch looks every few seconds)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
