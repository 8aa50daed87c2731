"""The progress of long work (indexing, evaluations, reports), for whoever shows it: none is silent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vlm.activity import activity

ProgressCallback = Callable[[str, int, int], None]
"""Called with the name of the work, how much of it this rank has done, and how much it has to do."""

_callback: ContextVar[ProgressCallback | None] = ContextVar("callback", default=None)


@contextmanager
def on_progress(callback: ProgressCallback) -> Iterator[None]:
    """Within the block long work calls `callback` as it goes on."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def report_progress(work: str, done: int, total: int) -> None:
    """Report that `done` of `total` are done; nothing happens where nobody listens."""
    activity.touch(activity.slack)
    callback = _callback.get()
    if callback is not None:
        callback(work, done, total)
