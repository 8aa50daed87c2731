"""The owner of a run directory: the one process that writes to it, so that two never train into the same files."""

import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from vlm.config import Config
from vlm.errors import UserError, reason
from vlm.sealed import read_json_object, sealed_json

OWNER = "owner.json"
LAUNCH = "VLM_LAUNCH"
"""The variable by which the ranks of one launch on several nodes know each other, from one life to the next."""
_START_TIME = 19  # field of /proc/PID/stat behind the name: when the process began, in ticks since the machine did


class OwnerRecord(Config):
    """Which process owns a run directory, so that it can be found again: its number alone may be another's by now."""

    run: str
    folder: int
    host: str
    boot: str
    namespace: str
    pid: int
    began: int
    since: str
    launch: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {ascii(self.host)[1:-1]} since {ascii(self.since)[1:-1]}"

    @classmethod
    def of_this_process(cls, run: Path) -> "OwnerRecord":
        """The record with which the process that asks owns `run`."""
        return cls(
            run=str(run.resolve()),
            folder=run.stat().st_ino,
            host=socket.gethostname(),
            boot=_boot(),
            namespace=_namespace(),
            pid=os.getpid(),
            began=_began(os.getpid()) or 0,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            launch=os.environ.get(LAUNCH, ""),
        )

    def is_of(self, run: Path) -> bool:
        """Whether it is about this folder, and did not come into it by a copy of another one on this machine."""
        is_this_host = self.host == socket.gethostname()
        return not is_this_host or self.run == str(run.resolve()) or self.folder == run.stat().st_ino

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None where it cannot be seen from here.

        The nodes of one launch begin a life together, when those of the last one have ended or are given up as lost.
        """
        unseen = True if self.launch and self.launch == os.environ.get(LAUNCH) else None
        if self.host != socket.gethostname():
            return unseen
        if self.boot != _boot():
            return True
        if self.namespace != _namespace():
            return unseen
        return _began(self.pid) != self.began


class Owner:
    """Takes and releases a run directory for this process, by a file in it."""

    def __init__(self, run: Path) -> None:
        self._path = run / OWNER
        self._record: OwnerRecord | None = None

    def take(self) -> str | None:
        """Own the folder, which is there; words on the owner before, where one has ended without releasing it.

        Raises:
            UserError: another process owns it that is there, or whose end cannot be seen from this machine.
            OSError: the folder cannot be written to.
        """
        if self._record is not None:
            return None
        with _one_at_a_time(self._path.parent):
            before = self._read()
            if before is not None and not before.is_of(self._path.parent):
                before = None
            if before is not None:
                self._require_gone(before)
            self._path.unlink(missing_ok=True)
            self._write(OwnerRecord.of_this_process(self._path.parent))
        return None if before is None else f"taken over from {before}, which has ended"

    def release(self) -> None:
        """Leave the folder to whoever comes next; nothing where this process does not own it."""
        record, self._record = self._record, None
        with suppress(OSError, UserError):
            if record is not None and self._read() == record:
                self._path.unlink()

    def _require_gone(self, owner: OwnerRecord) -> None:
        gone = owner.is_gone()
        if gone is None:
            raise UserError(
                f"{self._path.parent} belongs to {owner}, which cannot be looked at from here; "
                f"if it has ended, remove {self._path} and start again"
            )
        if not gone:
            raise UserError(f"{self._path.parent} is being written by {owner}; end that run, or choose another run=DIR")

    def _read(self) -> OwnerRecord | None:
        """Who owns the folder; None when nobody does, or when a kill kept somebody from saying so."""
        try:
            if not self._path.stat().st_size:
                return None
        except FileNotFoundError:
            return None
        try:
            return OwnerRecord.model_validate(read_json_object(self._path))
        except (UserError, ValidationError):
            raise UserError(
                f"{self._path} is damaged, and does not say which process owns the run; remove it if none does"
            ) from None

    def _write(self, record: OwnerRecord) -> None:
        """Put the record there whole, unless another machine was faster."""
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{OWNER}.", suffix=".partial")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(sealed_json(json.loads(record.model_dump_json())))
            try:
                os.link(name, self._path)
            except FileExistsError:
                raise
            except OSError:  # a disk without hard links
                with open(self._path, "x", encoding="utf-8") as file:
                    file.write(Path(name).read_text(encoding="utf-8"))
        except FileExistsError:
            raise UserError(f"{self._path.parent}: another process has just begun to write there") from None
        finally:
            os.unlink(name)
        self._record = record


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep two processes of one machine from taking the folder over at once, where its disk has locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _boot() -> str:
    """The name of this start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError as error:
        return reason(error)


def _namespace() -> str:
    """Within which container process numbers are counted."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None when it has ended (a zombie has)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[_START_TIME])
