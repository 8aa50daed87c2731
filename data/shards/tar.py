"""One tar shard: where its members lie, and their bytes."""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vlm.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512
# webdataset's rule: a sample's key ends at the first dot of the file name; the folder part belongs to the key.
_MEMBER = re.compile(r"^((?:.*/)?[^./][^/.]*)\.([^/]+)$", re.DOTALL)


class Extent(NamedTuple):
    """A member's bytes within its shard."""

    offset: int
    size: int


class Problem(NamedTuple):
    """Something in a shard that cannot be used, with the key it concerns ("" for the shard as a whole)."""

    key: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The samples of one shard, in the order stored: members by suffix for each key, and what had to be left out."""

    samples: dict[str, dict[str, Extent]]
    problems: tuple[Problem, ...]


def list_shard(path: Path, shown: str, where: str) -> Listing:
    """Group the members of the plain tar `path` into samples, reading headers only.

    A truncated or damaged tar yields the samples that are complete before the damage. `shown` is the name for messages.

    Raises:
        UserError: the file cannot be opened or is no tar.
    """
    samples: dict[str, dict[str, Extent]] = {}
    problems: list[Problem] = []
    damage = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                if isinstance(member, str):
                    damage = member
                elif member.isreg():
                    _add(member, samples, problems)
    except tarfile.TarError as error:
        raise UserError(f"{where}: {shown} is no tar file ({error})") from error
    except OSError as error:
        raise UserError(f"{where}: {shown} cannot be read ({error.strerror or error})") from error
    if damage is not None:
        problems.append(Problem("", damage))
        _drop_incomplete_end(samples, path.stat().st_size)
    return Listing(samples, tuple(problems))


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo | str]:
    """The tar's members, then, if it does not end as a tar should, a description of the damage."""
    first = True
    while True:
        try:
            member = tar.next()
        except tarfile.ReadError as error:
            if first:
                raise
            yield _damage(tar.offset, str(error))
            return
        if member is None:
            break
        first = False
        yield member
    if tar.fileobj is not None:
        tar.fileobj.seek(tar.offset)
        if (tail := tar.fileobj.read(_BLOCK)) != bytes(_BLOCK):
            yield _damage(tar.offset, "nothing follows" if len(tail) < _BLOCK else "no header follows")


def _damage(offset: int, what: str) -> str:
    return f"the shard is cut off or damaged at byte {offset:,} ({what}); the samples before it are used"


def _add(member: tarfile.TarInfo, samples: dict[str, dict[str, Extent]], problems: list[Problem]) -> None:
    match = _MEMBER.match(member.name)
    if match is None:
        return
    key, suffix = match[1], match[2].lower()
    if key.startswith("/") or ".." in key.split("/"):
        problems.append(Problem(key, f"member {member.name} points outside the shard"))
        return
    members = samples.setdefault(key, {})
    if suffix in members:
        problems.append(Problem(key, f"member {member.name} comes twice; the first one is used"))
    else:
        members[suffix] = Extent(member.offset_data, member.size)


def _drop_incomplete_end(samples: dict[str, dict[str, Extent]], file_size: int) -> None:
    """Take out a cut shard's last sample if a member is cut, or missing while the sample before has it."""
    if not samples:
        return
    last, *before = list(samples)[-1], *list(samples)[-2:-1]
    cut = any(extent.offset + extent.size > file_size for extent in samples[last].values())
    if cut or (before and samples[last].keys() < samples[before[0]].keys()):
        del samples[last]


def read_extent(descriptor: int, extent: Extent) -> bytes:
    """The bytes of one member of an open shard. Raises OSError where the file is too short."""
    data = os.pread(descriptor, extent.size, extent.offset)
    if len(data) != extent.size:
        raise OSError(f"it ends before byte {extent.offset + extent.size:,}")
    return data
