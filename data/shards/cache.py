"""Every shard as a plain local tar: remote and gzipped ones through copies that all processes of a node share."""

import hashlib
import logging
import os
import re
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, WithJsonSchema

from data.shards.copies import Copies
from data.shards.remote import READ_BYTES, open_remote
from data.shards.retry import (
    ChangedError,
    RetryConfig,
    TransferError,
    UnavailableError,
    describe,
    is_busy,
    is_temporary,
    retried,
    root_cause,
)
from data.shards.stamp import Stamp
from data.shards.store import is_remote, local_path, stamp_once, store_of
from data.shards.unpack import GZIP_MAGIC, unzipped
from vlm.config import Config
from vlm.paths import LocalPath

_MOST_DIGITS = 30
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([kMGTP]?)(i?)B?", re.IGNORECASE)

_log = logging.getLogger(__name__)


def parse_size(text: Any) -> int:
    """Bytes from "200GB", "1.5 TiB" or a whole number; units of 1000, with an i of 1024. Raises ValueError."""
    written = isinstance(text, str) or (isinstance(text, int) and not isinstance(text, bool) and abs(text) < 2**63)
    match = _SIZE.fullmatch(str(text).strip().replace("_", "").replace(",", "")) if written else None
    if match is None or len(match[1]) > _MOST_DIGITS:
        shown = repr(text)[:60] if written else f"a {type(text).__name__}"
        raise ValueError(f'a size is a number and a unit, such as "200GB" or "64 GiB"; found {shown}')
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgtp".index(unit.lower() or " "))


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    Field(ge=0, le=2**60),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": "^[0-9.]+ ?[kKMGTP]?i?B?$"},
                {"type": "integer", "minimum": 0, "maximum": 2**60},
            ]
        }
    ),
]
"""A number of bytes that a recipe may write with its unit."""


class CacheConfig(Config):
    """The cache of remote and gzipped shards on each node: its folder, and how much it may take."""

    folder: Annotated[
        LocalPath | None, Field(description="On a local disk; by default in the user's cache folder.")
    ] = None
    limit: Annotated[Size, Field(description='What the copies may take together, as in "200GB".')] = 100 * 10**9

    @property
    def path(self) -> Path:
        """The folder that is meant."""
        return Path(self.folder).expanduser() if self.folder else default_cache()


def default_cache() -> Path:
    """The folder for copies when the recipe names none."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlm" / "shards"


class OpenFile(NamedTuple):
    """A plain tar that is open for reading, and the state of the shard that it holds."""

    descriptor: int
    stamp: Stamp

    @property
    def path(self) -> Path:
        """A path to the open file, good until it is closed even if the copy is removed."""
        return Path(f"/dev/fd/{self.descriptor}")


class ShardCache:
    """Local plain tars for shards from anywhere; each is fetched once a node, however many processes ask.

    A process asks the store once about the state of a remote shard, and stays with that. Pickling and forking are safe.
    """

    def __init__(self, config: CacheConfig | None = None, retry: RetryConfig | None = None) -> None:
        self.config = config or CacheConfig()
        self.retry = retry or RetryConfig()
        self._copies = Copies(self.config.path, self.config.limit)
        self._stamps: dict[str, Stamp] = {}
        self._digests: dict[Path, str] = {}
        self._alive: set[str] = set()
        self._etag_is_md5 = True

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardCache, (self.config, self.retry)

    def place(self, name: str, suffix: str) -> Path:
        """The path for something small about `name`, such as its index, in the cache folder, outside the limit."""
        return self._copies.beside(name, suffix)

    def stamp(self, name: str, stop: threading.Event | None = None) -> Stamp:
        """The state of the shard: of a local one now, of a remote one when this process first asked.

        Raises:
            FileNotFoundError, PermissionError, UnavailableError: it cannot be known.
        """
        return retried(name, self.retry, partial(self._stamp_once, name), stop=stop)

    def contact(self, name: str) -> None:
        """Ask the store of a remote shard for a sign of life, in seconds: a start should not be silent for minutes.

        A store that is busy, or says that the shard is not there, is alive; so is one that answered before.

        Raises:
            UnavailableError: it does not answer, or only with errors.
        """
        store = store_of(name)
        if not is_remote(name) or store in self._alive:
            return
        brief = self.retry.for_first_contact()
        try:
            retried(name, brief, partial(self._stamp_once, name, brief.silence))
        except (FileNotFoundError, PermissionError):
            pass
        except UnavailableError as error:
            if not is_busy(root_cause(error.__cause__ or error)):
                raise
        self._alive.add(store)

    def local(self, name: str, expected: Stamp | None = None, stop: threading.Event | None = None) -> Path:
        """The shard as a plain tar: a local one itself, else its copy, fetched if need be.

        A gzipped shard is unpacked, one that is cut off as far as it goes. If the store fails, a copy of the state
        `expected` stands in, with a warning. A copy can go as soon as others need its room: `open` can't come too late.
        `stop` lets another thread end the fetching.

        Raises:
            FileNotFoundError, PermissionError, UnavailableError: it cannot be read.
            UserError: the name is wrong, or the cache folder cannot be used.
        """
        return self._find(name, expected, stop)[0]

    def open(self, name: str, expected: Stamp | None = None) -> OpenFile:
        """The shard as `local` finds it, opened for the caller to close, with its state."""
        while True:
            path, stamp = self._find(name, expected, None)
            try:
                return OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), stamp)
            except FileNotFoundError:
                if not is_remote(name) and path == local_path(name):
                    raise

    def _find(self, name: str, expected: Stamp | None, stop: threading.Event | None) -> tuple[Path, Stamp]:
        if not is_remote(name) and not retried(name, self.retry, partial(_is_gzip, local_path(name))):
            return local_path(name), self.stamp(name)
        return retried(name, self.retry, partial(self._find_once, name, expected, stop), stop=stop)

    def _find_once(self, name: str, expected: Stamp | None, stop: threading.Event | None) -> tuple[Path, Stamp]:
        try:
            stamp = self._stamp_once(name)
        except Exception as error:
            # Not after all attempts: a run whose store is away would wait for each shard.
            if expected is None or not is_temporary(root_cause(error)):
                raise
            copy = self._copies.place(name, expected)
            if not self._copies.use(copy):
                raise
            _log.warning("%s: %s; its copy is used", name, describe(root_cause(error)))
            return copy, expected
        copy = self._copies.place(name, stamp)
        try:
            if not self._copies.use(copy):
                with self._copies.writing(copy):
                    if not self._copies.use(copy):
                        self._fetch(name, stamp, copy, stop)
        except ChangedError:
            self._stamps.pop(name, None)
            raise
        return copy, stamp

    def _stamp_once(self, name: str, silence: float | None = None) -> Stamp:
        if not is_remote(name):
            return stamp_once(name, self.retry.silence)
        if name not in self._stamps:
            self._stamps[name] = stamp_once(name, silence or self.retry.silence)
        return self._stamps[name]

    def _fetch(self, name: str, stamp: Stamp, copy: Path, stop: threading.Event | None) -> None:
        if not is_remote(name):
            plain = self._unpacked(local_path(name), copy, stop)
            if self._stamp_once(name) != stamp:
                raise ChangedError("it was replaced while it was read")
            self._copies.publish(plain, copy)
            return
        partial_copy = self._copies.partial_copy(copy)
        checksum = self._download(name, stamp, partial_copy, stop) or stamp.checksum
        self._verify(partial_copy, stamp, checksum)
        if _is_gzip(partial_copy):
            self._copies.publish(self._unpacked(partial_copy, copy, stop), copy)
            partial_copy.unlink(missing_ok=True)
        else:
            self._copies.publish(partial_copy, copy)

    def _download(self, name: str, stamp: Stamp, partial_copy: Path, stop: threading.Event | None) -> str | None:
        """Add to the partial copy what it lacks; returns a checksum that came with the bytes."""
        have = partial_copy.stat().st_size if partial_copy.exists() else 0
        if stamp.size is None or have > stamp.size:
            partial_copy.unlink(missing_ok=True)
            have = 0
        if have and have == stamp.size:
            return None
        self._copies.make_room((stamp.size or 0) - have, partial_copy)
        source, checksum = open_remote(name, have, self.retry.silence, stamp)
        with closing(source), self._copies.appending(partial_copy) as write:
            while data := source.read(READ_BYTES):
                write(data)
                _go_on(stop)
        return checksum

    def _verify(self, partial_copy: Path, stamp: Stamp, checksum: str | None) -> None:
        size = partial_copy.stat().st_size
        if stamp.size is not None and size != stamp.size:
            if size > stamp.size:
                partial_copy.unlink()
            raise TransferError(f"{size:,} of {stamp.size:,} bytes arrived")
        if checksum is None or (checksum.startswith("md5?") and not self._etag_is_md5):
            return
        kind, _, right = checksum.partition(":")
        with partial_copy.open("rb") as file:
            digest = hashlib.file_digest(file, kind.rstrip("?")).hexdigest()
        if digest == right:
            return
        # Bytes that arrive twice alike are what is stored: an "md5?" that differs from them is no MD5, and none is.
        if kind == "md5?" and self._digests.get(partial_copy) == digest:
            self._etag_is_md5 = False
            return
        self._digests[partial_copy] = digest
        partial_copy.unlink()
        raise TransferError(f"its {kind.rstrip('?').upper()} is {digest}, the store says {right}")

    def _unpacked(self, packed: Path, copy: Path, stop: threading.Event | None) -> Path:
        plain = self._copies.partial_copy(copy).with_suffix(".plain.part")
        plain.unlink(missing_ok=True)
        self._copies.make_room(packed.stat().st_size, packed)
        with packed.open("rb") as file, self._copies.appending(plain) as write:
            for data in unzipped(file, str(packed)):
                write(data)
                _go_on(stop)
        return plain


def _go_on(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise UnavailableError("it is no longer asked for")


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return os.pread(file.fileno(), len(GZIP_MAGIC), 0) == GZIP_MAGIC
