"""How far an evaluation is, for whoever shows it: long ones are not silent."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watcher = Callable[[str, int, int], None]
"""Called with what is being done, how much of it this rank has done, and how much it has to do."""

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Within the block evaluations tell `watcher` how far they are."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(work: str, done: int, total: int) -> None:
    """Say that `done` of `total` are done; nothing where nobody watches."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher(work, done, total)
