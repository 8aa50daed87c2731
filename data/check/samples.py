"""The one place where the tools read shards: every complete sample as stored, and what the tar itself lacks.

Training reads by the index (`data.shards.reader`), which holds the parts that it trains on, and no sample with
neither an image nor a text. The tools believe no index: they list the tar itself, and report or copy every member of
every sample.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Final, NamedTuple

from data.samples.bad_sample import BadSampleError
from data.samples.captions import read_captions, read_fields
from data.samples.documents import ImagePlace, document_pieces
from data.samples.labels import class_number
from data.shards.cache import ShardCache
from data.shards.tar import (
    TWICE,
    Extent,
    Problem,
    document_images,
    image_suffix,
    list_shard,
    only,
    read_extent,
)
from vlm.errors import UserError

UNREADABLE_SHARD: Final = "unreadable shard"
DAMAGED_SHARD: Final = "damaged shard"
UNSAFE_MEMBER: Final = "unsafe member"
UNREADABLE_MEMBER: Final = "unreadable member"
REPEATED_MEMBER: Final = "repeated member"
NO_IMAGE: Final = "no image"
EMPTY_IMAGE: Final = "empty image"
UNDECODABLE_IMAGE: Final = "undecodable image"
UNREADABLE_JSON: Final = "unreadable json"
UNREADABLE_CAPTION: Final = "unreadable caption"
NO_CAPTION: Final = "no caption"
EMPTY_CAPTION: Final = "empty caption"
UNREADABLE_LABEL: Final = "unreadable label"
UNREADABLE_DOCUMENT: Final = "unreadable document"


class Finding(NamedTuple):
    """Something wrong: its kind, the key it concerns ("" for the shard as a whole), and what exactly."""

    kind: str
    key: str
    reason: str


class FindingError(Exception):
    """A sample that cannot be used, with the finding that says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.reason)
        self.finding = finding


@dataclass(frozen=True)
class StoredSample:
    """One sample of an open shard: its place among the shard's samples, and its members by suffix."""

    shard: "OpenShard"
    position: int
    key: str
    members: dict[str, Extent]

    def read(self, suffix: str) -> bytes:
        """The stored bytes of one member.

        Raises:
            OSError: the shard cannot be read any more.
        """
        return self.shard.read(self.members[suffix])

    def image(self) -> bytes:
        """The stored image file.

        Raises:
            FindingError: it has none, or an empty one.
        """
        suffix = image_suffix(self.members)
        if suffix is None:
            raise self._error(NO_IMAGE, f"it has {only(self.members)}")
        if not self.members[suffix].size:
            raise self._error(EMPTY_IMAGE, "its image has 0 bytes")
        return self.read(suffix)

    @property
    def in_document(self) -> tuple[str, ...]:
        """The suffixes of the images of a document, which has no image without a number; else none."""
        return () if image_suffix(self.members) else tuple(document_images(self.members))

    def document_image(self, suffix: str) -> bytes:
        """One of a document's image files. Raises FindingError for an empty one."""
        if not self.members[suffix].size:
            raise self._error(EMPTY_IMAGE, f"its image {suffix} has 0 bytes")
        return self.read(suffix)

    def document_text(self, mark: str) -> str:
        """The texts of a document, joined. Raises FindingError where texts and images do not go together."""
        try:
            pieces = document_pieces(self.fields(), mark)
        except BadSampleError as error:
            raise self._error(UNREADABLE_DOCUMENT, str(error)) from error
        images = set(self.in_document)
        for piece in pieces:
            if isinstance(piece, ImagePlace) and piece.suffix not in images:
                reason = f"its json names an image {piece.suffix!r:.60}, which is not among its members"
                raise self._error(UNREADABLE_DOCUMENT, reason)
        return " ".join(piece.strip() for piece in pieces if isinstance(piece, str))

    def fields(self) -> dict[str, Any]:
        """The fields of its json member; none where it has no such member.

        Raises:
            FindingError: the member is no JSON object.
        """
        try:
            return read_fields(self.read("json") if "json" in self.members else None)
        except BadSampleError as error:
            raise self._error(UNREADABLE_JSON, str(error)) from error

    def captions(self, fields: dict[str, Any], *, needed: bool = False) -> tuple[str, ...]:
        """All its captions, stripped; none, unless they are `needed`, for a sample with a class (`cls`) and no text.

        Raises:
            FindingError: they are missing, empty, or no UTF-8 text.
        """
        text = self.read("txt") if "txt" in self.members else None
        try:
            captions = read_captions(text, fields)
        except BadSampleError as error:
            raise self._error(UNREADABLE_CAPTION, str(error)) from error
        if captions or ("cls" in self.members and not needed):
            return captions
        if text is None and not fields.keys() & {"caption", "captions"}:
            raise self._error(NO_CAPTION, "it has no caption")
        raise self._error(EMPTY_CAPTION, "its captions are empty")

    def label(self) -> int | None:
        """Its class number; None when it has none.

        Raises:
            FindingError: its cls is no class number.
        """
        try:
            return class_number(self.read("cls"), "cls") if "cls" in self.members else None
        except BadSampleError as error:
            raise self._error(UNREADABLE_LABEL, str(error)) from error

    def _error(self, kind: str, reason: str) -> FindingError:
        return FindingError(Finding(kind, self.key, reason))


class OpenShard:
    """The complete samples of one shard, in stored order, and what is wrong with the tar around them.

    A context manager: the file is open within. `num_bytes` is the size of the unpacked tar.

    Raises:
        UserError: the shard cannot be read, or is no tar.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            handle = _cache().open(name)
        except OSError as error:
            raise UserError(f"shards: {name} cannot be read ({error.strerror or error})") from error
        try:
            listing = list_shard(handle.path, name, "shards")
        except BaseException:
            os.close(handle.descriptor)
            raise
        self._descriptor = handle.descriptor
        self._samples = listing.samples
        self.findings = tuple(_finding(problem) for problem in listing.problems)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def __enter__(self) -> "OpenShard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[StoredSample]:
        for position, (key, members) in enumerate(self._samples.items()):
            yield StoredSample(self, position, key, members)

    def keys(self) -> tuple[str, ...]:
        """The key of every sample."""
        return tuple(self._samples)

    def read(self, extent: Extent) -> bytes:
        """The bytes of one member.

        Raises:
            OSError: the file is unreadable, or shorter than it was.
        """
        return read_extent(self._descriptor, extent)


def shard_state(name: str) -> str:
    """The state by which a shard is known again: its size and version, as the store says.

    Raises:
        UserError: the shard is not there.
    """
    try:
        stamp = _cache().stamp(name)
    except OSError as error:
        raise UserError(f"shards: {name} cannot be read ({error.strerror or error})") from error
    return f"{stamp.size}|{stamp.version}"


@cache
def _cache() -> ShardCache:
    """One a process, where remote and gzipped shards lie unpacked."""
    return ShardCache()


def _finding(problem: Problem) -> Finding:
    if not problem.key:
        return Finding(DAMAGED_SHARD, "", problem.reason)
    if problem.key.startswith("/") or ".." in problem.key.split("/"):
        return Finding(UNSAFE_MEMBER, problem.key, problem.reason)
    return Finding(REPEATED_MEMBER if TWICE in problem.reason else UNREADABLE_MEMBER, problem.key, problem.reason)


def hash64(data: bytes) -> int:
    """A 64-bit name of some bytes: the same everywhere and always, and as good as unique among 10^9."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
