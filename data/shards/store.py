"""Shards and their small companions by name, wherever they are stored, in spite of stores that fail for a while.

A name is a local path, a URL that fsspec knows (`s3://`, `gs://`, `hf://`, `https://`, `memory://`, ...), or
`pipe:COMMAND`, whose command the shell runs as it stands: names are trusted as much as programs are.

Every function tries again as its RetryConfig says, and then raises FileNotFoundError, PermissionError or
UnavailableError (each an OSError with one line); a scheme that is unknown, or whose package is missing, is a UserError.
"""

import io
import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from data.shards.remote import READ_BYTES, ByteStream, filesystem, open_remote, remote_stamp, scheme
from data.shards.retry import RetryConfig, UnavailableError, describe, is_temporary, retried
from data.shards.stamp import Stamp
from vlm.errors import UserError

__all__ = [
    "RetryConfig",
    "Stamp",
    "UnavailableError",
    "companion",
    "exists",
    "is_command",
    "is_remote",
    "list_remote",
    "local_path",
    "open_stream",
    "read_bytes",
    "stamp",
    "stamp_once",
    "store_of",
    "without_query",
    "write_remote",
]

_DEFAULT = RetryConfig()


def is_remote(name: str) -> bool:
    """Whether `name` is a URL (other than `file://`) or a `pipe:` command, rather than a local path."""
    return scheme(name) not in ("", "file")


def is_command(name: str) -> bool:
    """Whether `name` is a `pipe:` command."""
    return scheme(name) == "pipe"


def without_query(name: str) -> str:
    """An address of the web up to its query, which may hold slashes and signs of its own; other names as they are."""
    return name.partition("?")[0] if scheme(name) in ("http", "https") else name


def store_of(name: str) -> str:
    """The store of a remote name: the scheme and host of its address."""
    start, _, rest = name.partition("://")
    return f"{start}://{rest.partition('/')[0]}"


def companion(name: str, suffix: str) -> str:
    """The name of the small companion of a shard: the suffix belongs to the path, not to a query after it."""
    path = without_query(name)
    return path + suffix + name[len(path) :]


def require_store(name: str) -> None:
    """Raise UserError where the scheme of a URL is unknown, or its package is not installed."""
    try:
        filesystem(name, _DEFAULT.silence)
    except OSError as error:  # some (ftp) connect at once
        raise UserError(f"{name}: {error.strerror or error}") from error


def local_path(name: str) -> Path:
    """The path that a name which is not remote stands for."""
    return Path(name.removeprefix("file://")).expanduser()


def stamp(name: str, retry: RetryConfig = _DEFAULT) -> Stamp:
    """The identity of the bytes now stored under `name`; of a pipe nothing is known."""
    return retried(name, retry, partial(stamp_once, name, retry.silence))


def stamp_once(name: str, silence: float) -> Stamp:
    """A single attempt at `stamp`."""
    if is_remote(name):
        return remote_stamp(name, silence)
    state = os.stat(os.path.expanduser(name.removeprefix("file://")))  # half the time of a Path's
    return Stamp(state.st_size, f"mtime:{state.st_mtime_ns}")


def exists(name: str, retry: RetryConfig = _DEFAULT) -> bool:
    """Whether there is something to read under `name`; many public stores refuse (403) what is not there."""
    try:
        stamp(name, retry)
    except (FileNotFoundError, PermissionError):
        return False
    return True


def read_bytes(name: str, retry: RetryConfig = _DEFAULT) -> bytes:
    """All that is stored under `name`: for manifests and sidecars."""

    def read() -> bytes:
        if not is_remote(name):
            return local_path(name).read_bytes()
        source, _ = open_remote(name, 0, retry.silence)
        with closing(source):
            return b"".join(iter(partial(source.read, READ_BYTES), b""))

    return retried(name, retry, read)


def write_remote(name: str, data: bytes, retry: RetryConfig = _DEFAULT) -> None:
    """Store a small file under a URL; object stores show the whole of it or nothing."""
    if scheme(name) == "pipe":
        raise UserError(f"{name}: a pipe is for reading only")

    def write() -> None:
        store, path = filesystem(name, retry.silence)
        try:
            store.pipe_file(path, data)
        except Exception:  # of a store with folders, the one that it belongs in may be missing
            store.makedirs(path.rpartition("/")[0], exist_ok=True)
            store.pipe_file(path, data)

    retried(name, retry, write, "written")


def list_remote(pattern: str, where: str, retry: RetryConfig = _DEFAULT) -> list[str]:
    """The URLs that a URL with `*`, `?` or `[...]` matches now, sorted; `where` is the key to blame in messages.

    Raises:
        UserError: the store cannot list (http), or could not be reached.
    """
    kind = scheme(pattern)
    if kind in ("http", "https", "pipe"):
        raise UserError(f"{where}: {pattern}: {kind} cannot list files; name the shards, as in {{00000..00099}}.tar")

    def find() -> list[str]:
        store, path = filesystem(pattern, retry.for_first_contact().silence)
        store.invalidate_cache()  # what an earlier call saw must not stand in for what is stored now
        named = (str(store.unstrip_protocol(path_in_store)).partition("://")[2] for path_in_store in store.glob(path))
        rooted = pattern.startswith(f"{kind}:///")
        host = _host(pattern.partition("://")[2], path)
        return sorted(f"{kind}://{host}{one if rooted or host else one.lstrip('/')}" for one in named)

    try:
        return retried(pattern, retry.for_first_contact(), find)
    except OSError as error:
        raise UserError(f"{where}: {error}") from error


def _host(address: str, path: str) -> str:
    """What an address has before the path within its store, where paths there do not begin with it (ftp, sftp)."""
    return address.removesuffix(path) if path.startswith("/") and address.endswith(path) else ""


def open_stream(name: str, retry: RetryConfig = _DEFAULT) -> io.BufferedReader:
    """The bytes under `name` from first to last, without a local copy; a broken connection is taken up again.

    A command's output cannot be taken up: once it has begun, its failure is an UnavailableError.
    """
    if not is_remote(name):
        return retried(name, retry, lambda: local_path(name).open("rb"))
    return io.BufferedReader(_Stream(name, retry), READ_BYTES)


class _Stream(io.RawIOBase):
    """A remote file as a stream that reopens where its connection broke."""

    def __init__(self, name: str, retry: RetryConfig) -> None:
        self._name = name
        self._retry = retry
        self._position = 0
        self._source: ByteStream | None = None
        self._stamp = Stamp(None, "")
        self._tried(self._open)

    def _tried(self, attempt: Callable[[], object]) -> None:
        retried(self._name, self._retry, attempt)

    def _open(self) -> ByteStream:
        silence = self._retry.silence
        if self._source is None:
            # Without the stamp, a file that is replaced in between would continue as another one.
            if not self._position:
                self._stamp = remote_stamp(self._name, silence)
            self._source, _ = open_remote(self._name, self._position, silence, self._stamp)
        return self._source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""

        def read() -> None:
            nonlocal data
            try:
                data = self._open().read(len(buffer))
            except Exception as error:
                self._drop()
                if self._position and scheme(self._name) == "pipe" and is_temporary(error):
                    raise UnavailableError(f"{self._name} broke off: {describe(error)}") from error
                raise

        self._tried(read)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _drop(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()
