"""The end of a process, as one line and an exit code. Imports nothing heavy: most mistakes are told before torch is."""

import errno
import os
import re
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path

from vlm.errors import EveryRankError, UserError, reason
from vlm.terminal import printable

USER, FAILURE = 2, 1  # exit codes; a signal's is 128 and its number
_LONGEST = 2_000  # characters of a line
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a path may be that somebody named: too long, forbidden, no folder or no file.
_OF_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
# How gloo, NCCL and the store that the ranks meet at say that somebody is not there any more.
_CONNECTION = re.compile(
    r"gloo|nccl|c10d|ProcessGroup|TCPStore|Connection (closed|reset)|Broken pipe|closed by peer|recv\w* failed|"
    r"socket|Timed out|timed out",
    re.IGNORECASE,
)
_CPU_MEMORY = re.compile(r"DefaultCPUAllocator: .*memory: you tried to allocate (\d+) bytes")
_PORT_IN_USE = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_NOT_MET = re.compile(r"clients joined|while trying to connect|waiting for clients|Failed to recv.*ping", re.IGNORECASE)


class StoppedError(BaseException):
    """A signal asked this process to stop; `message` says where it stood. No `except Exception` may swallow it.

    When the stop is `agreed`, all ranks end so by themselves.
    """

    def __init__(self, number: int, message: str = "", *, agreed: bool = False) -> None:
        super().__init__(message)
        self.number = number
        self.message = message
        self.agreed = agreed


@dataclass(frozen=True)
class End:
    """How a process ends: a word for the kind, one line, an exit code.

    Kinds are `user` (a mistake that a user can mend), `failure`, `signal`, and `lost` (another rank ended). An end that
    is `agreed` comes to all ranks by itself; one that comes `everywhere` alike is told by rank 0 alone besides.
    """

    kind: str
    message: str
    code: int
    agreed: bool = False
    everywhere: bool = False


def end_of(error: BaseException) -> End:
    """The end that an exception is, told in one line without control characters."""
    if isinstance(error, StoppedError):
        name = signal.Signals(error.number).name
        line = _line(f"stopped by {name}{error.message and ': '}{error.message}")
        return End("signal", line, code_of(error.number), agreed=error.agreed)
    if isinstance(error, KeyboardInterrupt):
        return End("signal", "stopped by SIGINT", code_of(signal.SIGINT))
    if isinstance(error, UserError):
        everywhere = isinstance(error, EveryRankError)
        return End("user", _line(str(error)), USER, agreed=everywhere, everywhere=everywhere)
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f"{error.filename}: " if error.filename else ""
        return End("user", _line(f"{where}{error.strerror}: make room, then start the same command again"), USER)
    if isinstance(error, OSError) and error.errno in _OF_PATHS and error.filename:
        return End("user", _line(f"{str(error.filename)[:200]}: {error.strerror}"), USER)
    if (words := _out_of_memory(error)) is not None:
        return End("failure", _line(f"out of memory ({words}); a smaller micro_batch needs less"), FAILURE)
    return _rendezvous_end(error) or End("failure", _line(_unexpected(error)), FAILURE)


def _out_of_memory(error: BaseException) -> str | None:
    """The words of an exception that says that there is no memory left; torch's for a CPU is any RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return reason(error)
    asked = _CPU_MEMORY.search(str(error)) if isinstance(error, RuntimeError) else None
    return None if asked is None else f"tried to allocate {int(asked[1]) / 2**30:,.2f} GiB"


def code_of(number: int) -> int:
    """The exit code for a signal: that of SIGTERM for those by which schedulers announce one."""
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)


def is_about_connection(error: BaseException) -> bool:
    """Whether an exception may be the echo of another rank's end."""
    return isinstance(error, (RuntimeError, ConnectionError)) and _CONNECTION.search(str(error)) is not None


def _rendezvous_end(error: BaseException) -> End | None:
    """Why the ranks did not meet, in a user's words."""
    if not isinstance(error, RuntimeError):
        return None
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    if _PORT_IN_USE.search(str(error)):
        line = f"the ranks cannot meet at {place} (MASTER_ADDR, MASTER_PORT): the port is in use; choose another"
        return End("user", line, USER)
    if _NOT_MET.search(str(error)):
        joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
        size = os.environ.get("WORLD_SIZE", "?")
        came = f"{joined[1]} of {joined[2]} ranks" if joined else f"not all {size} ranks"
        line = (
            f"{came} came to {place} (MASTER_ADDR, MASTER_PORT) in time: was every rank started, and with this address?"
        )
        return End("failure", line, FAILURE)
    return None


def _unexpected(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {reason(error)}{where}"


def _line(text: str) -> str:
    return printable(" ".join(text.split())[:_LONGEST])
