"""Single attempts at a remote store, through fsspec (http, s3, gs, hf, memory, ...) and webdataset (pipe)."""

import base64
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

import aiohttp
import fsspec
import fsspec.asyn
from fsspec.core import url_to_fs

from data.shards.retry import ChangedError, TransferError
from data.shards.stamp import Stamp
from vlm.errors import UserError, nearest

READ_BYTES = 8 << 20
"""Bytes asked for at once: large enough for a store's latency not to count."""

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*)://|^(pipe):")
_SHOWN = ("s3", "gs", "hf", "http", "https", "memory", "pipe", "file")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs"}
_MD5 = re.compile(r"^[0-9a-f]{32}$")

# A filesystem that a forked child collects would wait for a thread that lives in the parent only: none is let go.
_filesystems: dict[int, Any] = {}
os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


@runtime_checkable
class ByteStream(Protocol):
    """An open remote file, read once from start to end."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        ...

    def close(self) -> None:
        """Give the connection back."""
        ...


def scheme(name: str) -> str:
    """The scheme of a URL or "pipe"; "" for a local path."""
    match = _SCHEME.match(name)
    return (match[1] or match[2]) if match else ""


def filesystem(name: str, silence: float) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path within it; fsspec's own settings give credentials and endpoints.

    Raises:
        UserError: the scheme is unknown, or its package is not installed.
    """
    kind = scheme(name)
    options: dict[str, Any] = {}
    if kind in ("http", "https"):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
        given = fsspec.config.conf.get(kind, {}).get("client_kwargs", {})
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True, **given}}
    try:
        store, path = url_to_fs(name, **options)
    except ImportError as error:
        package = _PACKAGES.get(kind)
        hint = f"pip install {package}" if package else str(error)
        raise UserError(f"{name}: {kind}:// needs a package that is not installed ({hint})") from error
    except ValueError as error:
        if kind in fsspec.available_protocols():
            raise UserError(f"{name}: {error}") from error
        raise UserError(f"{name}: unknown scheme {kind}://; {nearest(kind, _SHOWN)}") from error
    _filesystems[id(store)] = store
    return store, path


def remote_stamp(name: str, silence: float) -> Stamp:
    """The stamp of the bytes under `name`, as the store says; nothing is known of a pipe's."""
    if scheme(name) == "pipe":
        return Stamp(None, "")
    store, path = filesystem(name, silence)
    info = store.info(path)
    if info.get("type") == "directory":
        raise IsADirectoryError(f"{name} is a folder")
    return _stamp(info, scheme(name))


def open_remote(name: str, start: int, silence: float, expected: Stamp | None = None) -> tuple[ByteStream, str | None]:
    """The bytes under `name` from `start` on, and a checksum of the whole that came with them.

    Raises:
        ChangedError: they are not the ones that `expected` describes.
    """
    kind = scheme(name)
    if kind == "pipe":
        return _Pipe(name, start), None
    store, path = filesystem(name, silence)
    if kind in ("http", "https"):
        body = _Body(store, path, start)
        if expected is not None and _contradicts(body.headers, expected):
            body.close()
            raise ChangedError("it was replaced while it was read")
        return body, _sent_checksum(body.headers)
    if expected is not None and _stamp(store.info(path), kind) != expected:
        raise ChangedError("it was replaced while it was read")
    file: ByteStream = store.open(path, "rb", block_size=READ_BYTES)
    if start:
        file.seek(start)  # type: ignore[attr-defined]
    return file, None


def _stamp(info: Mapping[str, Any], kind: str) -> Stamp:
    lfs = info.get("lfs") or {}
    checksum = None
    if kind == "s3" and _MD5.match(tag := str(info.get("ETag", "")).strip('"')):
        checksum = f"md5?:{tag}"
    elif sha := (lfs.get("sha256") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", None)):
        checksum = f"sha256:{sha}"
    elif md5 := (info.get("Content-MD5") or info.get("md5Hash")):
        checksum = f"md5:{base64.b64decode(md5).hex()}"
    size = info.get("size")
    return Stamp(None if size is None else int(size), _version(info), checksum)


def _version(info: Mapping[str, Any]) -> str:
    for field in ("ETag", "etag", "generation", "blob_id", "md5Hash", "Last-Modified", "LastModified", "mtime"):
        if info.get(field):
            return f"{field.lower()}:{info[field]}"
    for field in ("last_modified", "updated", "modified", "created"):
        if info.get(field):
            return f"{field}:{info[field]}"
    return ""


def _contradicts(headers: Mapping[str, str], expected: Stamp) -> bool:
    """Whether an answer's headers tell of other bytes; an answer that tells nothing contradicts nothing."""
    kind, _, value = expected.version.partition(":")
    header = headers.get(kind) if kind in ("etag", "last-modified") else None
    return header is not None and header != value


def _sent_checksum(headers: Mapping[str, str]) -> str | None:
    if md5 := headers.get("content-md5"):
        return f"md5:{base64.b64decode(md5).hex()}"
    if match := re.search(r"md5=([A-Za-z0-9+/=]+)", headers.get("x-goog-hash", "")):
        return f"md5:{base64.b64decode(match[1]).hex()}"
    tag = headers.get("etag", "").strip('"')
    return f"md5?:{tag}" if "x-amz-request-id" in headers and _MD5.match(tag) else None


class _Body:
    """The body of a GET. fsspec's own files would ask in blocks, or hand over a few kilobytes at a time."""

    def __init__(self, store: Any, url: str, start: int) -> None:
        self._loop = store.loop
        self._response = fsspec.asyn.sync(self._loop, self._get, store, url, start)
        # A Content-MD5 with part of a file would be that part's.
        self.headers = {key.lower(): value for key, value in self._response.headers.items()}
        if self._response.status == 206:
            self.headers.pop("content-md5", None)
        elif start:
            try:
                self._pass_over(start)
            except BaseException:
                self.close()
                raise

    @staticmethod
    async def _get(store: Any, url: str, start: int) -> Any:
        session = await store.set_session()
        options = dict(store.kwargs)
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        response = await session.get(store.encode_url(url), headers=headers, **options)
        response.raise_for_status()
        return response

    def read(self, size: int) -> bytes:
        data: bytes = fsspec.asyn.sync(self._loop, self._gather, size)
        return data

    async def _gather(self, size: int) -> bytes:
        chunks: list[bytes] = []
        try:
            while size > 0 and (chunk := await self._response.content.read(size)):
                chunks.append(chunk)
                size -= len(chunk)
        except Exception:
            if not chunks:  # else the next read meets it again
                raise
        return b"".join(chunks)

    def _pass_over(self, start: int) -> None:
        while start > 0:
            passed = len(self.read(min(start, READ_BYTES)))
            if not passed:
                raise TransferError("it ends before the part that was asked for")
            start -= passed

    def close(self) -> None:
        # Nobody waits for it: when a program ends, the loop's thread may have ended before.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._response.close)


class _Pipe:
    """The output of a command, which the user's name holds and the shell runs as it stands."""

    def __init__(self, name: str, start: int) -> None:
        if start:
            raise ValueError("a pipe is read from its start")
        from webdataset import gopen  # brings torch, which no other store needs

        self._pipe = gopen(name, "rb")

    def read(self, size: int) -> bytes:
        try:
            data: bytes = self._pipe.read(size)
            if not data:
                self._pipe.close()
        except OSError:
            raise self._failure() from None
        return data

    def _failure(self) -> OSError:
        status = self._pipe.status
        if status in (126, 127):
            return FileNotFoundError("the command cannot be run")
        return TransferError(f"the command ends with exit status {status}")

    def close(self) -> None:
        try:
            self._pipe.close()
        except OSError:  # a reader that leaves early breaks the pipe; one that read all has met the status
            return
