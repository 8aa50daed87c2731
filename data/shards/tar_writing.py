"""Writing a tar shard so that nobody meets half of it, the same members always as the same bytes."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.atomic import flush_to_disk


@contextmanager
def tar_aside(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar that takes its name at the end of the block, flushed to the disk; an error leaves nothing of it.

    One process at a time writes `path`: what a killed one left beside it is written over.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    try:
        with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as tar:
            yield tar
        flush_to_disk(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def add_member(tar: tarfile.TarFile, key: str, suffix: str, stored: bytes) -> None:
    """Add a sample's member with neither time nor owner."""
    member = tarfile.TarInfo(f"{key}.{suffix}")
    member.size = len(stored)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(stored))
