"""Unpacking of gzipped shards, as far as they go."""

import bz2
import io
import logging
import lzma
import zlib
from collections.abc import Iterator

from data.shards.headers import ByteSource

GZIP_MAGIC = b"\x1f\x8b"
_BZIP2_MAGIC, _XZ_MAGIC = b"BZh", b"\xfd7zXZ\0"
_CHUNK_BYTES = 1 << 20
# What unpacks to more than both is no data set but an attack: pictures hardly pack at all, texts tenfold.
_MOST_BYTES, _MOST_TIMES = 256 << 20, 200

_log = logging.getLogger(__name__)


def unzipped(source: ByteSource, name: str) -> Iterator[bytes]:
    """All that can be unpacked, in pieces of at most 1 MiB, up to a cut or damage.

    (The gzip module would make us lose a buffer before it.) What unpacks without end is left there, with a warning.
    """
    unzip = zlib.decompressobj(wbits=31)
    packed_bytes = unpacked_bytes = 0
    while packed := source.read(_CHUNK_BYTES):
        packed_bytes += len(packed)
        while packed:
            try:
                chunk = unzip.decompress(packed, _CHUNK_BYTES)
            except zlib.error:
                return
            unpacked_bytes += len(chunk)
            if unpacked_bytes > max(_MOST_BYTES, _MOST_TIMES * packed_bytes):
                _log.warning("%s: unpacks to more than %d times its size, and is read no further", name, _MOST_TIMES)
                return
            yield chunk
            packed = unzip.unconsumed_tail or unzip.unused_data
            if unzip.eof:
                unzip = zlib.decompressobj(wbits=31)
    yield unzip.flush()


def plain(stream: io.BufferedReader, name: str) -> ByteSource:
    """A stream's bytes, unpacked where they are packed by gzip, bzip2 or xz."""
    start = stream.peek(len(_XZ_MAGIC))
    if start.startswith(GZIP_MAGIC):
        return _ChunkStream(unzipped(stream, name))
    if start.startswith(_BZIP2_MAGIC):
        return bz2.BZ2File(stream)
    if start.startswith(_XZ_MAGIC):
        return lzma.LZMAFile(stream)
    return stream


class _ChunkStream:
    """A stream of pieces that come one by one."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        while not self._chunk:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._chunk = memoryview(chunk)
        data, self._chunk = self._chunk[:size], self._chunk[size:]
        return bytes(data)

    def seek(self, position: int, /) -> int:  # noqa: ARG002 - a ByteSource's signature
        """Not in a stream."""
        raise io.UnsupportedOperation("seek")
