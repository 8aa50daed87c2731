"""Loading processes: numbered pieces of work in, their results in order out."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from vlm.errors import UserError

Loaded = TypeVar("Loaded", bound=tuple[object, ...])


class _Failure(str):
    """A user's error on its way from a worker: pickled exceptions would arrive as tracebacks."""


class _Numbered(Dataset[Loaded | _Failure], Generic[Loaded]):
    """Work by number, as a DataLoader wants it."""

    def __init__(self, load: Callable[[int], Loaded]) -> None:
        self._load = load

    def __getitem__(self, number: int) -> Loaded | _Failure:
        try:
            return self._load(number)
        except UserError as error:
            return _Failure(error)


def load_ahead(
    load: Callable[[int], Loaded], numbers: range, *, workers: int, prefetch: int = 2, pinned: bool = False
) -> Iterator[Loaded]:
    """`load(n)` for each of `numbers`, in order, computed ahead in `workers` processes (0: here, when asked for).

    `load` is pickled or forked into the workers, one thread each; they take the numbers in turn. Nothing is drawn from
    this process's random generators. Leaving the iterator ends the workers.

    Raises:
        UserError: as `load` raised it, in whichever process.
    """
    loader = DataLoader(
        _Numbered(load),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pinned,
        collate_fn=_as_loaded,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each iterator takes a number from the global generator
    )
    for loaded in loader:
        if isinstance(loaded, _Failure):
            raise UserError(str(loaded))
        yield loaded


def _as_loaded(loaded: Loaded | _Failure) -> Loaded | _Failure:
    """DataLoader's own conversion would turn tuples into lists."""
    return loaded


def _start_worker(worker: int) -> None:  # noqa: ARG001 (DataLoader passes the number)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # an interrupt is the training process's to handle, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
