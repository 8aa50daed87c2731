"""The samples of a shard that is read once, from its first byte to its last."""

import io
import lzma
from collections.abc import Iterator
from typing import NamedTuple

from data.shards.headers import DamagedTarError, Member, TarReader
from data.shards.tar import (
    FILLED_UP,
    MOST_BYTES,
    Extent,
    Problem,
    add_member,
    is_filled_up,
    key_and_suffix,
    shown_name,
)
from data.shards.unpack import plain

APART = "its members lie apart, and `mode: sequential` reads only members that lie side by side"


class Streamed(NamedTuple):
    """One sample: its key, and the bytes of those of its members that are read, by suffix."""

    key: str
    members: dict[str, bytes]


def stream_samples(stream: io.BufferedReader, name: str) -> Iterator[Streamed | Problem]:
    """Every sample whose members lie side by side, and what is wrong with all else, in stored order."""
    grouping = _Grouping()
    tar = TarReader(plain(stream, name))
    try:
        for member in tar:
            yield from grouping.add(member, tar)
        yield from grouping.last()
        if (wrong := tar.tail()) is not None:
            yield Problem("", wrong)
        elif not grouping.samples:
            yield Problem("", "the shard holds no samples")
    except DamagedTarError as error:
        yield from grouping.end_of_damaged(error.member, tar)
        what = f"{error.what}: {shown_name(error.member)}" if error.member else error.what
        yield Problem("", f"the shard cannot be read on at byte {error.offset:,} ({what})")
    except (OSError, EOFError, lzma.LZMAError) as error:
        yield from grouping.end_of_damaged("", tar)
        yield Problem("", f"the shard cannot be read on ({error!s:.200})")


class _Grouping:
    """Members that come one by one, put together by key."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, Extent]] = {}
        self._current = Streamed("", {})
        self._before: frozenset[str] = frozenset()

    def add(self, member: Member, tar: TarReader) -> Iterator[Streamed | Problem]:
        """Read a member; yields the sample before it when that is complete."""
        named = key_and_suffix(member.name)
        known = named is not None and named[0] in self.samples
        problem = add_member(member, self.samples)
        if problem is not None:
            yield problem
            return
        if named is None or member.kind != "file":
            return
        key, suffix = named
        if key != self._current.key:
            yield from self.end()
            if known:
                yield Problem(key, APART)
                return
            self._current = Streamed(key, {})
        if suffix in MOST_BYTES:
            self._current.members[suffix] = tar.read(member)

    def last(self) -> Iterator[Streamed | Problem]:
        """The last sample, unless what was stored last of it is filled up with zeros."""
        suffix, data = list(self._current.members.items())[-1] if self._current.members else ("", b"")
        if is_filled_up(suffix, data):
            yield Problem("", FILLED_UP)
        else:
            yield from self.end()

    def end(self) -> Iterator[Streamed]:
        """The sample that no more members come to."""
        if self._current.key:
            self._before = frozenset(self._current.members)
            yield self._current
            self._current = Streamed("", {})

    def end_of_damaged(self, member: str, tar: TarReader) -> Iterator[Streamed]:
        """The last sample of a damaged shard, unless a member of it is cut, or missing while the one before has it."""
        named = key_and_suffix(member)
        is_intact = (named is None or named[0] != self._current.key) and tar.is_padded
        if is_intact and not self._current.members.keys() < self._before:
            yield from self.end()
