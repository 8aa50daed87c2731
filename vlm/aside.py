"""Folders that are made aside and take their name when whole; and the removal of what we made, and of nothing else."""

import fcntl
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from vlm.atomic import default_mode

_MARKER = ".vlm-partial"
"""A file in a folder that is being made: without it, a folder is nobody's but the user's."""


@contextmanager
def folder_aside(directory: Path) -> Iterator[Path]:
    """A new hidden folder beside `directory`; it becomes that, which must be missing or empty, or goes on an error.

    What a killed process left of the same folder goes first; that of a living one (it holds a lock) stays.

    Raises:
        OSError: the folder cannot be made, or cannot take its name.
    """
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left in directory.parent.glob(f".{_escaped(directory.name)}.*.partial"):
        _remove_left(left)
    aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name[:200]}.", suffix=".partial"))
    lock = os.open(aside, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _locked(lock)
        aside.chmod(default_mode() | 0o111 & ~_mask())
        (aside / _MARKER).touch()
        with _ended_by_exceptions():
            yield aside
        (aside / _MARKER).unlink()
        aside.replace(directory)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """Signals that would end the process without a chance to tidy up end it as an exit does; others' handlers stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    plain = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in plain:
            signal.signal(number, _exit)
        yield
    finally:
        for number in plain:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def remove_files(folder: Path, names: str) -> bool:
    """Remove the files whose names match the pattern, and the folder when nothing else is in it; links stay links.

    Returns whether the folder is gone (or never was). Nothing below it is entered.
    """
    if folder.is_symlink() or not folder.is_dir():
        return not folder.exists()
    for entry in list(folder.iterdir()):
        if re.fullmatch(names, entry.name) and (entry.is_symlink() or not entry.is_dir()):
            entry.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
        return True
    return False


def _remove_left(folder: Path) -> None:
    if folder.is_symlink() or not (folder / _MARKER).is_file():
        return
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _locked(lock):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(descriptor: int) -> bool:
    """Whether the lock was free; where the file system has none, nobody's folder is taken for abandoned."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name[:200])


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
