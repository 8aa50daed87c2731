"""One tar shard: where its members lie, and their bytes."""

import os
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.shards.headers import NO_HEADER, DamagedTarError, Member, TarReader
from vlm.errors import UserError
from vlm.terminal import one_line

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json", "cls")
MOST_BYTES = {**dict.fromkeys(IMAGE_SUFFIXES, 256 << 20), **dict.fromkeys(TEXT_SUFFIXES, 16 << 20)}
"""The most bytes of a member that is read: what a header claims is memory that a reader takes."""

TWICE = "comes twice"
NO_IMAGE = "it has no image"
_BEFORE = "the samples before it are used"
FILLED_UP = f"the last sample is filled up with zeros; {_BEFORE}"
_END = 2  # bytes that tell
_LONGEST_NAME = 4096
_LONGEST_SHOWN = 200
_MOST_SUFFIXES = 8
_LONGEST_MAGIC = 6
_MAGIC = {
    b"\x1f\x8b": "gzipped",
    b"BZh": "packed by bzip2: unpack it, or pack it by gzip",
    b"\xfd7zXZ\0": "packed by xz: unpack it, or pack it by gzip",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it, or pack it by gzip",
    b"PK\x03\x04": "a zip file",
    b"PAR1": "a parquet file",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
}
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


class NoTarError(UserError):
    """A file that is no tar at all, as against one that is damaged."""


def list_shard(path: Path, shown: str, where: str) -> Listing:
    """Group the members of the plain tar `path` into samples, reading headers only.

    A truncated or damaged tar yields the samples that are complete before the damage. `shown` is the name for messages.

    Raises:
        UserError: the file cannot be opened or read; a NoTarError where it is no tar.
    """
    try:
        with path.open("rb") as file:
            return _list(file, os.fstat(file.fileno()).st_size)
    except NoTarError as error:
        raise NoTarError(f"{where}: {shown} is no tar file ({error})") from None
    except OSError as error:
        raise UserError(f"{where}: {shown} cannot be read ({error.strerror or error})") from error


def _list(file: BinaryIO, size: int) -> Listing:
    samples: dict[str, dict[str, Extent]] = {}
    problems: list[Problem] = []
    last = None
    tar = TarReader(file, size)
    try:
        for member in tar:
            last = member
            if (problem := add_member(member, samples)) is not None:
                problems.append(problem)
    except DamagedTarError as error:
        if last is None and not error.member:
            file.seek(0)
            raise NoTarError(_what_else(file.read(_LONGEST_MAGIC), error.what)) from None
        what = f"{error.what}: {shown_name(error.member)}" if error.member else error.what
        problems.append(Problem("", f"the shard is cut off or damaged at byte {error.offset:,} ({what}); {_BEFORE}"))
        is_cut = last is not None and not _is_padded(tar, last)
        _drop_incomplete_end(samples, last.name if last is not None and is_cut else error.member)
        return Listing(samples, tuple(problems))
    named = key_and_suffix(last.name) if last is not None else None
    if last is not None and named is not None and is_filled_up(named[1], _end_of(last, file.fileno())):
        problems.append(Problem("", FILLED_UP))
        samples.pop(named[0], None)
    if (wrong := tar.tail()) is not None:
        problems.append(Problem("", wrong))
    elif last is None:
        problems.append(Problem("", f"the shard has no members, only {size:,} zeros"))
    return Listing(samples, tuple(problems))


def add_member(member: Member, samples: dict[str, dict[str, Extent]]) -> Problem | None:
    """Add a member to the samples by key and suffix, as webdataset does; what is wrong with it if it cannot be used."""
    named = key_and_suffix(member.name)
    if named is None or member.kind == "folder":
        return None
    (key, suffix), name = named, shown_name(member.name)
    if len(member.name) > _LONGEST_NAME:
        return Problem(key[:_LONGEST_SHOWN], f"member {name} has a name of {len(member.name):,} characters")
    if key.startswith("/") or ".." in key.split("/"):
        return Problem(key, f"member {name} points outside the shard")
    if member.kind != "file":
        return Problem(key, f"member {name} is a {member.kind}, which is not read")
    most = MOST_BYTES.get(kind_of_member(suffix), member.size)
    if member.size > most:
        return Problem(key, f"member {name} has {member.size:,} bytes; at most {most:,} are read")
    members = samples.setdefault(key, {})
    if suffix in members:
        return Problem(key, f"member {name} {TWICE}; the first one is used")
    members[suffix] = Extent(member.offset, member.size)
    return None


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """The sample's key and the member's suffix in a member's name; None where it has none."""
    match = _MEMBER.match(name)
    return None if match is None else (match[1], match[2].lower())


def image_suffix(suffixes: Container[str]) -> str | None:
    """The suffix of a sample's image, the first of `IMAGE_SUFFIXES` among its members'; None for one without image."""
    return next((suffix for suffix in IMAGE_SUFFIXES if suffix in suffixes), None)


def document_images(members: Mapping[str, Extent]) -> dict[str, Extent]:
    """The images of a document by suffix (0.jpg of KEY.0.jpg), of a sample that has a json member; else none."""
    if "json" not in members:
        return {}
    images = (suffix for suffix in members if "." in suffix and kind_of_member(suffix) in IMAGE_SUFFIXES)
    return {suffix: members[suffix] for suffix in images}


def kind_of_member(suffix: str) -> str:
    """What a member is by its suffix: jpg of 0.jpg."""
    return suffix.rpartition(".")[2]


def shown_name(name: str) -> str:
    """A member's name for messages: no control characters, and not endless."""
    return one_line(name[:_LONGEST_SHOWN]) + ("..." if len(name) > _LONGEST_SHOWN else "")


def only(suffixes: Iterable[str]) -> str:
    """The members that a sample has instead of an image, and why that may be: many have dots in their file names."""
    names = list(suffixes)
    shown = ", ".join(names[:_MOST_SUFFIXES]) + (", ..." if len(names) > _MOST_SUFFIXES else "")
    dotted = next((name for name in names if "." in name and name.rpartition(".")[2] in IMAGE_SUFFIXES), None)
    hint = "" if dotted is None else "; a key ends at the first dot of a file name, so there is none in it"
    return f"only {shown}{hint}"


def _key_of(name: str) -> str:
    named = key_and_suffix(name)
    return named[0] if named else ""


def _what_else(start: bytes, what: str) -> str:
    """The kind of file that a file which is no tar begins like; `what` is wrong with it as a header."""
    if not start:
        return "it is empty"
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if kind:
        return f"it is {kind}"
    return "it does not begin with a tar header" if what == NO_HEADER else f"it begins with {what}"


def is_filled_up(suffix: str, end: bytes) -> bool:
    """Whether a picture or text with this `end` was filled up with zeros, as a copy that is longer than its bytes."""
    kind = kind_of_member(suffix)
    count = 1 if kind in TEXT_SUFFIXES else _END  # WebP is padded with one
    return kind in MOST_BYTES and len(end) >= count and not any(end[-count:])


def _end_of(member: Member, descriptor: int) -> bytes:
    size = min(_END, member.size)
    return os.pread(descriptor, size, member.offset + member.size - size)


def _is_padded(tar: TarReader, member: Member) -> bool:
    """Whether zeros follow a member, up to the next block: else its size was a lie, or is damaged."""
    tar.read(member)
    return tar.is_padded


def _drop_incomplete_end(samples: dict[str, dict[str, Extent]], member: str) -> None:
    """Take out a damaged shard's last sample if `member` is of it, or a member missing that the sample before has."""
    if not samples:
        return
    last, *before = list(samples)[-1], *list(samples)[-2:-1]
    if _key_of(member) == last or (before and samples[last].keys() < samples[before[0]].keys()):
        del samples[last]


def read_extent(descriptor: int, extent: Extent) -> bytes:
    """The bytes of one member of an open shard. Raises OSError where the file is too short."""
    data = b""
    if extent.offset + extent.size <= os.fstat(descriptor).st_size:  # else pread would first take that much memory
        data = os.pread(descriptor, extent.size, extent.offset)
    if len(data) != extent.size:
        raise OSError(f"it ends before byte {extent.offset + extent.size:,}")
    return data
