"""The folder of local copies, shared by all processes of a node: whole files only, the least recently used ones go."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from data.shards.lock import locked, locked_if_free
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
        """The path of the copy of the shard with this name and stamp, whether it is there or not."""
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
            lock = ExitStack()
            lock.enter_context(locked(self._lock_of(copy)))
        with lock:
            yield

    def partial_copy(self, copy: Path) -> Path:
        """The path of bytes on their way to `copy`; what a computer crash left there is not found again."""
        return copy.with_name(f"{copy.stem}.{_BOOT}.part")

    @contextmanager
    def appending(self, partial_copy: Path) -> Iterator[Callable[[bytes], None]]:
        """A function that adds bytes to `partial_copy`."""
        with self._usable():
            file = partial_copy.open("ab", buffering=0)

        def write(data: bytes) -> None:
            with self._usable():
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]

        with file:
            yield write

    def publish(self, partial_copy: Path, copy: Path) -> None:
        """Make a finished partial copy the copy, and make room for it."""
        with self._usable():
            flush_to_disk(partial_copy)
            partial_copy.replace(copy)
            flush_to_disk(self.folder)
        self.make_room(0, copy)

    def make_room(self, incoming: int, protected: Path) -> None:
        """Remove the least recently used copies until `incoming` bytes fit under the limit and on the disk.

        `protected` stays, and so do partial copies that are being written.
        """
        with self._usable(), locked(self.folder / "lock"):
            files = sorted((e for e in self.folder.iterdir() if e.suffix in (".tar", ".part")), key=_age)
            total = sum(_size(file) for file in files)
            for file in files:
                if total + incoming <= self.limit and incoming <= shutil.disk_usage(self.folder).free:
                    return
                if file != protected:
                    total -= self._remove(file)

    def _remove(self, file: Path) -> int:
        size = _size(file)
        if file.suffix != ".part":
            file.unlink(missing_ok=True)
            return size
        with locked_if_free(self._lock_of(file)) as free:
            if free:
                file.unlink(missing_ok=True)
        return size if free else 0

    def _lock_of(self, file: Path) -> Path:
        """Of 256 locks one: those of one folder that are held at once are not many."""
        return self.folder / f"lock-{_hash(file.name.partition('.')[0])[:2]}"

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"the cache folder {self.folder} cannot be used ({error.strerror or error})") from error


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
