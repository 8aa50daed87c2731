"""Trying again: which failures of a store pass by themselves, and how long to wait for that."""

import errno
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Annotated, TypeVar

import aiohttp
from pydantic import Field

from data.randomness import Draws
from vlm.config import Config
from vlm.errors import UserError, reason

Result = TypeVar("Result")

_TEMPORARY_STATUS = frozenset({408, 425, 429})
_TEMPORARY_ERRNO = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EAGAIN,
        errno.EBUSY,
        errno.EINTR,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
    }
)

_ALIKE = 3

_log = logging.getLogger(__name__)


class RetryConfig(Config):
    """Retries of a store that fails: waits double from `first_wait` to `longest_wait`, less up to half."""

    attempts: Annotated[
        int, Field(ge=1, le=1000, description="How often a read is tried before it counts as failed.")
    ] = 8
    first_wait: Annotated[float, Field(ge=0, le=86400, description="Seconds before the second attempt.")] = 1.0
    longest_wait: Annotated[float, Field(ge=0, le=86400, description="Seconds that the waits grow to.")] = 30.0
    silence: Annotated[float, Field(gt=0, le=86400, description="Seconds without a byte that end a connection.")] = 60.0

    def for_first_contact(self) -> "RetryConfig":
        """Retries of a store that has not answered yet: a wrong address or a store that is off is named in seconds."""
        return self.model_copy(
            update={
                "attempts": min(self.attempts, 2),
                "longest_wait": min(self.longest_wait, 2.0),
                "silence": min(self.silence, 4.0),
            }
        )


class UnavailableError(OSError):
    """A store could not be read, after all attempts; its text is one line with the name and the last reason."""


class TransferError(OSError):
    """Bytes that did not arrive as they are stored; another attempt may bring them."""


class ChangedError(TransferError):
    """Bytes under a name are not those of its stamp: they were replaced since."""


def retried(
    name: str,
    config: RetryConfig,
    attempt: Callable[[], Result],
    verb: str = "read",
    stop: threading.Event | None = None,
) -> Result:
    """The result of `attempt`, called again while it fails for reasons that may pass; `stop` ends the waiting.

    `verb` is what cannot be done with `name`, in messages.

    Raises:
        FileNotFoundError, PermissionError: there is no `name`, or it may not be read; said at the first attempt.
        UnavailableError: it failed in another lasting way, or `config.attempts` times, or a transfer ended three times
            at the same place.
        UserError: the name itself is wrong.
    """
    ends: list[str] = []
    for number in range(1, config.attempts + 1):
        try:
            return attempt()
        except (UserError, UnavailableError):
            raise
        except Exception as error:
            cause = root_cause(error)
            if not is_temporary(cause):
                raise _final(name, cause, verb) from error
            tried = f"{number} attempt{'s' if number > 1 else ''}"
            ends.append(_end_of_transfer(cause) or f"attempt {number}")
            if number == config.attempts or ends[-_ALIKE:] == [ends[-1]] * _ALIKE:
                raise UnavailableError(f"{name} cannot be {verb}: {describe(cause)} ({tried})") from error
            seconds = wait(name, number, config)
            _log.warning("%s: %s; %s, the next in %.1f s", name, describe(cause), tried, seconds)
            if (stop or threading.Event()).wait(seconds):
                raise UnavailableError(f"{name} is no longer asked for ({tried})") from error
    raise AssertionError("unreachable")


def _end_of_transfer(error: BaseException) -> str | None:
    """The place where an answer broke off, or its difference from what was announced; None for other failures."""
    broken = isinstance(error, TransferError | aiohttp.ClientPayloadError) and not isinstance(error, ChangedError)
    return str(error) if broken else None


def wait(name: str, number: int, config: RetryConfig) -> float:
    """Seconds to wait after failed attempt `number`, the first being 1.

    The jitter differs between processes, else the thousand that read the same file would all come back at once.
    """
    longest = min(config.longest_wait, config.first_wait * 2.0 ** (number - 1))
    return longest * Draws("retry", name, number, socket.gethostname(), os.getpid()).uniform(0.5, 1.0)


def root_cause(error: BaseException) -> BaseException:
    """The error behind an error: fsspec says "not found" for whatever kept it from finding."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, aiohttp.ClientError | OSError):
        return root_cause(cause)
    return error


def is_temporary(error: BaseException) -> bool:
    """Whether another attempt can help: time-outs, lost connections, busy servers, short or damaged transfers.

    Errors of a store's own library that tell no more count as temporary; missing credentials do not.
    """
    if (status := _status(error)) is not None:
        return status in _TEMPORARY_STATUS or status >= 500
    if isinstance(error, (TransferError, TimeoutError, ConnectionError)):
        return True
    if (
        isinstance(error, ValueError | aiohttp.TooManyRedirects) or "Credential" in type(error).__name__
    ):  # a bad certificate is a ValueError
        return False
    if isinstance(error, OSError):
        # gcsfs gives a refusal as a bare OSError
        return error.errno in _TEMPORARY_ERRNO or (error.errno is None and _unspecific(error))
    return not type(error).__module__.startswith("builtins")


def is_busy(error: BaseException) -> bool:
    """Whether a store answers that it is asked too much at the moment."""
    return _status(error) in (429, 503)


def describe(error: BaseException) -> str:
    """The reason of an error in a few words, for a message."""
    if (status := _status(error)) is not None:
        words = getattr(error, "message", None) or reason(error)
        return f"the store answers {status} {' '.join(str(words).split())[:120]}".rstrip()
    if isinstance(error, TimeoutError):
        return "the store did not answer in time"
    if isinstance(error, aiohttp.TooManyRedirects):
        return "it leads from one address to the next without end"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the store closed the connection without a whole answer"
    if isinstance(error, aiohttp.ClientPayloadError):
        return f"the answer broke off ({reason(error)[:120]})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return reason(error)


def _unspecific(error: OSError) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    return not str(error).startswith("Forbidden")


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, gcsfs (`code`), or requests and httpx (`response`)."""
    if isinstance(error, aiohttp.ClientError):
        value = getattr(error, "status", None)
    else:
        value = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    text = str(value)
    return int(text) if text.isdigit() and 400 <= int(text) < 600 else None


def _final(name: str, cause: BaseException, verb: str) -> BaseException:
    status = _status(cause)
    if status == 404 or isinstance(cause, FileNotFoundError):
        return FileNotFoundError(f"{name} is not there")
    if status in (401, 403) or isinstance(cause, PermissionError) or str(cause).startswith("Forbidden"):
        return PermissionError(f"{name} may not be {verb} ({describe(cause)})")
    if isinstance(cause, ValueError | NotImplementedError) and not isinstance(cause, OSError):
        return UserError(f"{name}: {reason(cause)}")
    if isinstance(cause, OSError | aiohttp.ClientError) or status is not None or "Credential" in type(cause).__name__:
        return UnavailableError(f"{name} cannot be {verb}: {describe(cause)}")
    return cause
