"""Locks between the processes of a node: a file each, which is there only while somebody holds or awaits it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that the file `path` stands for; waits for a process that does. A dead process holds none."""
    lock = _take(path, fcntl.LOCK_EX)
    assert lock is not None
    try:
        yield
    finally:
        _give_back(path, lock)


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock if nobody does; yields whether it is held."""
    lock = _take(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            _give_back(path, lock)


def _take(path: Path, how: int) -> int | None:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, how)
            if _is_at(path, lock):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        # Who held it has removed it since: whoever comes now would make another one.
        os.close(lock)


def _is_at(path: Path, lock: int) -> bool:
    try:
        at_path = os.stat(path)
    except FileNotFoundError:
        return False
    locked_file = os.fstat(lock)
    return (at_path.st_dev, at_path.st_ino) == (locked_file.st_dev, locked_file.st_ino)


def _give_back(path: Path, lock: int) -> None:
    """Unlocked before it is closed: a process forked meanwhile has the same lock open."""
    path.unlink(missing_ok=True)
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)
