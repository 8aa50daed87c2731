"""Plain copies of gzipped shards, so that every shard can be read at any offset."""

import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vlm.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
_KEPT_SECONDS = 30 * 24 * 3600


def plain_shard(shard: Path, cache: str | None, where: str) -> Path:
    """`shard` itself if it is not gzipped, else its unpacked copy in the folder `cache` (or the user's cache folder).

    The cache holds one copy for each state (path, size, time of change) of a shard; copies that nobody asked for during
    30 days are removed when a new one is written. A shard cut off while gzipped is unpacked as far as it goes.

    Raises:
        UserError: the shard cannot be read, or the cache cannot be written.
    """
    try:
        with open(shard, "rb") as file:
            if file.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
                return shard
        state = shard.stat()
    except OSError as error:
        raise UserError(f"{where}: {shard} cannot be read ({error.strerror})") from error
    folder = Path(cache).expanduser() if cache else default_cache()
    name = hashlib.blake2b(
        f"{shard.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode(), digest_size=12
    ).hexdigest()
    copy = folder / f"{name}.tar"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if copy.is_file():
            os.utime(copy)
        else:
            _remove_unused(folder)
            _unpack(shard, copy)
    except OSError as error:
        raise UserError(f"{where}: {shard} cannot be unpacked into {folder} ({error.strerror or error})") from error
    return copy


def default_cache() -> Path:
    """The folder for unpacked shards when the recipe names none."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlm" / "shards"


def _unpack(shard: Path, copy: Path) -> None:
    """Written aside and renamed: ranks that unpack the same shard at once each end with a whole copy."""
    descriptor, aside = tempfile.mkstemp(dir=copy.parent, prefix=copy.stem, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as target, open(shard, "rb") as source:
            for piece in unzipped(source):
                target.write(piece)
        os.replace(aside, copy)
    finally:
        Path(aside).unlink(missing_ok=True)


def unzipped(source: BinaryIO) -> Iterator[bytes]:
    """All that can be unpacked, up to a cut or damage (which the gzip module would make us lose a buffer before)."""
    unzip = zlib.decompressobj(wbits=31)
    while packed := source.read(1 << 20):
        while packed:
            try:
                yield unzip.decompress(packed)
            except zlib.error:
                return
            packed = unzip.unused_data
            if unzip.eof:
                unzip = zlib.decompressobj(wbits=31)
    yield unzip.flush()


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - _KEPT_SECONDS
    for entry in folder.glob("*.tar"):
        if entry.stat().st_mtime < oldest:
            entry.unlink(missing_ok=True)
