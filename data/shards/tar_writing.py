"""Writing a tar shard so that nobody meets half of it, the same members always as the same bytes."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.atomic import file_aside


@contextmanager
def tar_aside(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar that takes its name at the end of the block, flushed to the disk; an error leaves nothing of it.

    One process at a time writes `path`: what a killed one left beside it is written over.

    Raises:
        OSError: it cannot be written.
    """
    with file_aside(path) as aside, tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as tar:
        yield tar


def add_member(tar: tarfile.TarFile, key: str, suffix: str, stored: bytes) -> None:
    """Add a sample's member with neither time nor owner."""
    member = tarfile.TarInfo(f"{key}.{suffix}")
    member.size = len(stored)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(stored))
