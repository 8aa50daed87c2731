"""The members of a tar from its headers alone, none of which is believed further than the file goes.

ustar, GNU (long names, base-256 sizes, sparse) and PAX archives are read. Every number is checked before it is used,
extended headers have a limit, and nothing recurses: whatever a file holds, reading it ends in members or in
DamagedTarError.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

BLOCK = 512
NO_HEADER = "no header follows"
RECORD = 20 * BLOCK
"""Bytes to whose multiples an archive is filled up with zeros."""

_LARGEST_EXTENSION = 1 << 20
_CHUNK_BYTES = 1 << 20
_MOST_TAIL = 64 << 20
_LONG_KEY = 80
_ZEROS = bytes(BLOCK)
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_LARGEST_OCTAL = 8**11
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=\n]+)=")
_DECIMAL = re.compile(rb"[0-9]{1,18}")
_LONG_NAME, _LONG_LINK, _SPARSE = b"L", b"K", b"S"
_PAX, _PAX_GLOBAL = (b"x", b"X"), b"g"
_KINDS = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "pipe",
    _SPARSE: "sparse file",
}
_WITHOUT_DATA = ("hard link", "symbolic link", "device", "folder", "pipe")


@runtime_checkable
class ByteSource(Protocol):
    """A file, or a stream: then it is only read."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        ...

    def seek(self, position: int, /) -> int:
        """Read on from there."""
        ...


class Member(NamedTuple):
    """One member: what it is ("file" is the only kind that is read), and where its bytes lie."""

    name: str
    kind: str
    offset: int
    size: int


class DamagedTarError(Exception):
    """A tar that cannot be read on: at which byte, why, and the name of the member that is cut ("" for none)."""

    def __init__(self, offset: int, what: str, member: str = "") -> None:
        super().__init__(what)
        self.offset = offset
        self.what = what
        self.member = member


class _Extended(NamedTuple):
    """Values of extended headers for the member that follows them."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


class TarReader:
    """The members of a tar in `file`, which is read from its present place on: with `size`, by seeking.

    Without a size (a stream) the bytes of a member can be had by `read` before the next one is asked for.
    """

    def __init__(self, file: ByteSource, size: int | None = None) -> None:
        self._file = file
        self._size = size
        self._position = 0
        self.end = 0
        """The offset of the next header."""
        self.is_padded = True
        """Whether zeros fill up the member that `read` brought last: else its size is none, if no header follows."""

    def __iter__(self) -> Iterator[Member]:
        """Every member in stored order.

        Raises:
            DamagedTarError: the tar does not end as a tar should.
        """
        extended = _Extended()
        while (block := self._header()) is not None:
            at, kind = self.end, block[156:157]
            size = _number(block[124:136], at, "size")
            if kind in (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_GLOBAL):
                stored = self._extension(at, size)
                if kind == _LONG_NAME:
                    extended = extended._replace(name=_long_name(stored, at))
                elif kind in _PAX:
                    extended = _with_pax(extended, stored, at)
                elif kind == _PAX_GLOBAL:
                    _refuse_global(stored, at)
                self.end = at + BLOCK + _padded(size)
                continue
            yield self._member(block, extended, size)
            extended = _Extended()

    def _member(self, block: bytes, extended: _Extended, size: int) -> Member:
        """The member of a header; the next header is known afterwards."""
        at, offset = self.end, self._data_start(block)
        name = extended.name or _name(block)
        kind = _KINDS.get(block[156:157], "unknown kind of member")
        if block[156:157] == b"\0" and name.endswith("/"):
            kind = "folder"
        if extended.size is not None and extended.size != size:
            # Sizes that fit a plain header are in it: whoever says another one beside it lies.
            if extended.size < _LARGEST_OCTAL:
                raise DamagedTarError(at, f"the PAX header says {extended.size:,} bytes, the plain one {size:,}", name)
            size = extended.size
        if kind in _WITHOUT_DATA:
            size = 0
        if self._size is not None and offset + size > self._size:
            raise DamagedTarError(at, f"a member of {size:,} bytes does not fit", name)
        self.end = offset + _padded(size)
        return Member(name, "sparse file" if extended.sparse and kind == "file" else kind, offset, size)

    def read(self, member: Member) -> bytes:
        """The bytes of the member that came last. Raises DamagedTarError where the stream ends within them."""
        self._go_to(member.offset)
        data = self._take(member.size)
        if len(data) < member.size:
            raise DamagedTarError(member.offset, "the stream ends within a member", member.name)
        self.is_padded = not any(self._take(_padded(member.size) - member.size))
        return data

    def tail(self) -> str | None:
        """The fault of all that follows the last member; None where it is the end of a tar, padded as usual."""
        at = self.end
        self._go_to(at)
        zeros = self._position - at  # of a stream, the first are read already
        while zeros < _MOST_TAIL and (chunk := self._take(_CHUNK_BYTES)):
            if chunk.count(0) < len(chunk):
                first = at + zeros + len(chunk) - len(chunk.lstrip(b"\0"))
                return f"something follows the end of the archive at byte {first:,} (a second tar?), and is not used"
            zeros += len(chunk)
        if at + zeros > -(-(at + 2 * BLOCK) // RECORD) * RECORD:
            return f"{zeros:,} zeros follow byte {at:,}, more than a tar ends with: what was stored there is lost"
        return None

    def _header(self) -> bytes | None:
        """The next header, checked against its checksum; None at the end of the archive."""
        at = self.end
        self._go_to(at)
        block = self._take(BLOCK)
        if block == _ZEROS:
            return None
        if len(block) < BLOCK:
            raise DamagedTarError(at, "a header is cut" if block else "nothing follows")
        _check_header(block, at)
        return block

    def _extension(self, at: int, size: int) -> bytes:
        if size > _LARGEST_EXTENSION:
            raise DamagedTarError(at, f"an extended header of {size:,} bytes")
        stored = self._take(_padded(size))
        if len(stored) < size:
            raise DamagedTarError(at, "an extended header is cut")
        return stored[:size]

    def _data_start(self, block: bytes) -> int:
        """The offset of a member's bytes: behind its header, and what GNU's sparse files have more of it."""
        offset = self.end + BLOCK
        more = block[156:157] == _SPARSE and block[482] != 0
        while more:
            chunk = self._take(BLOCK)
            if len(chunk) < BLOCK:
                raise DamagedTarError(self.end, "a header is cut")
            offset, more = offset + BLOCK, chunk[504] != 0
        return offset

    def _go_to(self, position: int) -> None:
        if self._size is not None:
            self._file.seek(position)
            self._position = position
        while self._position < position:
            if not self._take(min(_CHUNK_BYTES, position - self._position)):
                raise DamagedTarError(self._position, "the stream ends within a member")

    def _take(self, size: int) -> bytes:
        """So many bytes, fewer only at the end."""
        chunks: list[bytes] = []
        while size > 0 and (chunk := self._file.read(min(size, _CHUNK_BYTES))):
            chunks.append(chunk)
            size -= len(chunk)
            self._position += len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def is_header_of(block: bytes, key: str, size: int) -> bool:
    """Whether this block is the header of a member of so many bytes whose name begins with `key`.

    A long name is not looked at: what a header holds of it is up to who wrote it.
    """
    if len(block) < BLOCK:
        return False
    try:
        _check_header(block, 0)
        same_size = _number(block[124:136], 0, "size") == size
    except DamagedTarError:
        return False
    return same_size and (len(key) > _LONG_KEY or _name(block).startswith(f"{key}."))


def _check_header(block: bytes, at: int) -> None:
    right = sum(block) - sum(block[148:156]) + 8 * 32
    if _number(block[148:156], at, "checksum") not in (right, right - 256 * _high_bytes(block)):
        raise DamagedTarError(at, NO_HEADER)


def _number(field: bytes, at: int, what: str) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if field[0] == 0xFF:
        raise DamagedTarError(at, f"a negative {what}")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise DamagedTarError(at, NO_HEADER if what == "checksum" else f"a {what} that is no number")
    return int(match[1] or b"0", 8)


def _high_bytes(block: bytes) -> int:
    """The number of bytes that some old programs took for negative when they summed up a header."""
    return sum(byte >> 7 for byte in block[:148] + block[156:])


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(stored: bytes) -> str:
    """A name; bytes that are no UTF-8 become the signs that stand for them, so that it can be written anywhere."""
    return stored.decode("utf-8", "backslashreplace")


def _long_name(stored: bytes, at: int) -> str:
    name, _, rest = stored.partition(b"\0")
    if any(rest):
        raise DamagedTarError(at, "a long name that does not end")
    return _text(name)


def _with_pax(extended: _Extended, stored: bytes, at: int) -> _Extended:
    values = _pax_values(stored, at)
    name = values.get(b"GNU.sparse.name", values.get(b"path"))
    size = values.get(b"size")
    if size is not None and not _DECIMAL.fullmatch(size):
        raise DamagedTarError(at, "a PAX header whose size is no number")
    return _Extended(
        extended.name if name is None else _text(name.partition(b"\0")[0]),
        extended.size if size is None else int(size),
        extended.sparse or any(key.startswith(b"GNU.sparse.") for key in values),
    )


def _refuse_global(stored: bytes, at: int) -> None:
    """Comments may stand for all members; a name or a size may not."""
    wrong = _pax_values(stored, at).keys() & {b"path", b"size"}
    if wrong:
        raise DamagedTarError(at, f"a global header says one {min(wrong).decode()} for all members")


def _pax_values(stored: bytes, at: int) -> dict[bytes, bytes]:
    values: dict[bytes, bytes] = {}
    start = 0
    while start < len(stored) and stored[start]:
        match = _PAX_RECORD.match(stored, start)
        stop = start + int(match[1]) if match else 0
        if match is None or stop <= match.end() or stored[stop - 1 : stop] != b"\n":
            raise DamagedTarError(at, "a PAX header that cannot be read")
        values[match[2]] = stored[match.end() : stop - 1]
        start = stop
    if any(stored[start:]):
        raise DamagedTarError(at, "a PAX header that cannot be read")
    return values
