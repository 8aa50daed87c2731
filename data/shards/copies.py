"""The folder of local copies, shared by all processes of a node: whole files only, the least recently used ones go."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.shards.stamp import Stamp
from vlm.atomic import flush_to_disk
from vlm.errors import UserError


class Copies:
    """One folder of copies that together hold at most `limit` bytes, or only the newest if that is larger.

    A copy is named by hashes of the shard's name and stamp. Each is written by one process at a time, under a lock
    that the system releases if the process dies, beside its place, and renamed when whole. Shards being written come on
    top of the limit. A copy can go while another process reads it: what is open stays readable.

    Every method raises UserError when the folder cannot be used.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def place(self, name: str, stamp: Stamp) -> Path:
        """Where the copy of the shard with this name and stamp is, or would be."""
        return self.folder / f"{_hash(name)}-{_hash(f'{stamp.size}|{stamp.version}')}.tar"

    def beside(self, name: str, suffix: str) -> Path:
        """A file of the folder that is named by a hash of `name`; only copies and parts of them are ever removed."""
        return self.folder / f"{_hash(name)}{suffix}"

    def use(self, copy: Path) -> bool:
        """Whether the copy is there; if so it counts as used now."""
        with self._usable():
            try:
                os.utime(copy)
            except FileNotFoundError:
                return False
            except PermissionError:  # another user's: as old as that user leaves it
                return copy.exists()
            return True

    @contextmanager
    def writing(self, copy: Path) -> Iterator[None]:
        """Hold the right to write `copy`; waits for a process that does."""
        with self._usable():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(self._lock_of(copy), wait=True)
        try:
            yield
        finally:
            _unlock(lock)

    def part(self, copy: Path) -> Path:
        """Where bytes on their way to `copy` are kept; what a computer crash left there is not found again."""
        return copy.with_name(f"{copy.stem}.{_BOOT}.part")

    @contextmanager
    def appending(self, part: Path) -> Iterator[Callable[[bytes], None]]:
        """A function that adds bytes to `part`."""
        with self._usable():
            file = part.open("ab", buffering=0)

        def write(data: bytes) -> None:
            with self._usable():
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]

        with file:
            yield write

    def publish(self, part: Path, copy: Path) -> None:
        """Make a finished part the copy, and make room for it."""
        with self._usable():
            flush_to_disk(part)
            part.replace(copy)
            flush_to_disk(self.folder)
        self.make_room(0, copy)

    def make_room(self, incoming: int, kept: Path) -> None:
        """Remove the least recently used copies until `incoming` bytes fit under the limit and on the disk.

        `kept` stays, and so do parts that are being written.
        """
        with self._usable():
            lock = _locked(self.folder / "lock", wait=True)
            try:
                files = sorted((e for e in self.folder.iterdir() if e.suffix in (".tar", ".part")), key=_age)
                total = sum(_size(file) for file in files)
                for file in files:
                    if total + incoming <= self.limit and incoming <= shutil.disk_usage(self.folder).free:
                        return
                    if file != kept:
                        total -= self._remove(file)
            finally:
                _unlock(lock)

    def _remove(self, file: Path) -> int:
        size = _size(file)
        if file.suffix == ".part":
            lock = _locked(self._lock_of(file), wait=False)
            if lock is None:
                return 0
            file.unlink(missing_ok=True)
            _unlock(lock)
        else:
            file.unlink(missing_ok=True)
        return size

    def _lock_of(self, file: Path) -> Path:
        """One of 256 lock files, which are never removed: a lock on a removed file keeps nobody out."""
        return self.folder / f"lock-{_hash(file.name.partition('.')[0])[:2]}"

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"the cache folder {self.folder} cannot be used ({error.strerror or error})") from error


def _locked(path: Path, *, wait: bool) -> int | None:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _unlock(lock: int | None) -> None:
    """Unlocked before it is closed: a process forked meanwhile has the same lock open."""
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _size(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def _age(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.stat().st_mtime_ns
    return 0


def _boot() -> str:
    """This start of the computer: a crash may leave a part as long as it was, but not with its bytes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return f"process-{os.getpid()}"


_BOOT = _boot()
