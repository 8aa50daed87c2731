"""What gzipped shards hold, as far as they go."""

import zlib
from collections.abc import Iterator
from typing import BinaryIO

GZIP_MAGIC = b"\x1f\x8b"


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
