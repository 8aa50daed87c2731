"""Any bytes in a shard: what it still holds is used, and all that is lost is told."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data.shards import headers
from data.shards.tar import Listing, NoTarError, list_shard
from tests.data.shards.test_tar import listed, stored_bytes, tar_with
from tests.data.small_shards import sample, write_shard
from vlm.errors import UserError

PAIRS = [(f"{n}.{suffix}", f"{n}{suffix}".encode()) for n in range(6) for suffix in ("jpg", "txt")]


def header(name: str | bytes, size: bytes, kind: bytes = b"0", extra: bytes = b"") -> bytes:
    """One header with these fields as they stand, and a right checksum; `extra` lies from byte 345 on."""
    block = bytearray(512)
    stored = name if isinstance(name, bytes) else name.encode()
    block[: len(stored)] = stored
    block[100:108], block[124 : 124 + len(size)], block[156:157] = b"0000644\0", size, kind
    block[257:265] = b"ustar  \0"
    block[345 : 345 + len(extra)] = extra
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def member(name: str | bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, b"%011o\0" % len(data), kind) + data + bytes(-len(data) % 512)


def pax(**values: str) -> bytes:
    records = b""
    for key, value in values.items():
        body = f" {key.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(body), len(body) + 9) if len(str(n)) + len(body) == n)
        records += str(length).encode() + body
    return member("PaxHeader", records, b"x")


GOOD = member("a.jpg", b"1") + member("a.txt", b"one")
REST = member("z.jpg", b"9") + member("z.txt", b"nine")
END = bytes(1024)


def listing_of(path: Path, content: bytes) -> Listing:
    path.write_bytes(content)
    return listed(path)


def test_the_hand_made_headers_are_those_of_tarfile(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(GOOD + pax(path="b/é.jpg") + REST + END)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getnames() == ["a.jpg", "a.txt", "b/é.jpg", "z.txt"]
    listing = listed(tmp_path / "x.tar")
    assert list(listing.samples) == ["a", "b/é", "z"]
    assert listing.problems == ()


def test_a_zero_filled_tail_is_told(tmp_path: Path) -> None:
    whole = tar_with(tmp_path / "x.tar", [(name, stored * 2000) for name, stored in PAIRS]).read_bytes()
    extents = [extent for parts in listed(tmp_path / "x.tar").samples.values() for extent in parts.values()]
    for place in (2, 4, 6, 8):
        at = extents[place].offset - 512  # the last member before is whole
        listing = listing_of(tmp_path / "x.tar", whole[:at] + bytes(len(whole) - at))
        assert list(listing.samples) == [str(n) for n in range(place // 2)]
        assert [p.reason for p in listing.problems] == [
            f"{len(whole) - at:,} zeros follow byte {at:,}, more than a tar ends with: what was stored there is lost"
        ]
        at += 512 + 1000  # and here it is not
        listing = listing_of(tmp_path / "x.tar", whole[:at] + bytes(len(whole) - at))
        assert list(listing.samples) == [str(n) for n in range(place // 2)]
        assert "the last sample is filled up with zeros" in listing.problems[0].reason


@pytest.mark.parametrize("size", [512, 1024, 10_240, 1 << 20])
def test_a_shard_of_zeros_only_is_told(tmp_path: Path, size: int) -> None:
    listing = listing_of(tmp_path / "x.tar", bytes(size))
    (problem,) = listing.problems
    assert f"{size:,} zeros" in problem.reason
    assert not listing.samples


def test_what_follows_the_end_is_told(tmp_path: Path) -> None:
    first = tar_with(tmp_path / "x.tar", PAIRS[:4]).read_bytes()
    second = tar_with(tmp_path / "y.tar", PAIRS[4:]).read_bytes()
    for glue in (b"", bytes(512), bytes(3 << 20)):
        listing = listing_of(tmp_path / "x.tar", first + glue + second)
        assert list(listing.samples) == ["0", "1"]
        (problem,) = listing.problems
        assert problem.reason == (
            f"something follows the end of the archive at byte {len(first + glue):,} (a second tar?), and is not used"
        )


SPARSE = header("b.jpg", b"%011o\0" % 512, b"S", bytes(137) + b"\1") + bytes(504) + b"\1" + bytes(7) + bytes(1024)
LIES: dict[str, tuple[bytes, str]] = {
    "negative": (header("b.jpg", b"\xff" * 12), "a negative size"),
    "negative octal": (header("b.jpg", b"-0000000010\0"), "a size that is no number"),
    "grouped octal": (header("b.jpg", b"0000_000010\0"), "a size that is no number"),
    "huge": (header("b.jpg", b"\x80" + b"\x7f" * 11), "does not fit: b.jpg"),
    "large": (header("b.jpg", b"77777777777\0"), "a member of 8,589,934,591 bytes does not fit: b.jpg"),
    "PAX size": (pax(size="513") + member("b.jpg", b"x"), "the PAX header says 513 bytes, the plain one 1: b.jpg"),
    "PAX size of 0": (pax(size="0") + member("b.jpg", b"x"), "the PAX header says 0 bytes"),
    "PAX negative": (pax(size="-5") + member("b.jpg", b"x"), "whose size is no number"),
    "PAX huge": (pax(size="9" * 17) + member("b.jpg", b"x"), "does not fit"),
    "PAX without end": (member("p", b"99 path=c.jpg\n", b"x") + member("b.jpg", b"x"), "cannot be read"),
    "PAX of length 0": (member("p", b"0 path=c.jpg\n", b"x") + member("b.jpg", b"x"), "cannot be read"),
    "PAX of letters": (member("p", b"\xff" * 40, b"x") + member("b.jpg", b"x"), "cannot be read"),
    "PAX with more": (member("p", b"14 path=c.jpg\n\0more", b"x") + member("b.jpg", b"x"), "cannot be read"),
    "name with more": (member("p", b"c.jpg\0more", b"L") + member("b.jpg", b"x"), "a long name that does not end"),
    "PAX of gigabytes": (header("p", b"77777777777\0", b"x"), "an extended header of 8,589,934,591 bytes"),
    "name of gigabytes": (header("p", b"77777777777\0", b"L"), "an extended header of 8,589,934,591 bytes"),
    "global name": (member("g", b"14 path=c.jpg\n", b"g") + member("b.jpg", b"x"), "one path for all members"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_ends_the_shard_and_is_told(tmp_path: Path, name: str) -> None:
    stored, said = LIES[name]
    listing = listing_of(tmp_path / "x.tar", GOOD + stored + REST + END)
    assert list(listing.samples) == ["a"]
    (problem,) = listing.problems
    assert said in problem.reason
    assert f"at byte {len(GOOD):,}" in problem.reason or "PAX" in name or "more" in name


LEFT_OUT = {
    "hard link": (header("b.jpg", b"%011o\0" % 0, b"1"), "member b.jpg is a hard link, which is not read"),
    "symbolic link": (header("b.jpg", b"%011o\0" % 0, b"2"), "is a symbolic link"),
    "device": (header("b.jpg", b"%011o\0" % 0, b"3"), "is a device"),
    "sparse": (SPARSE, "is a sparse file"),
    "PAX sparse": (pax(GNU__sparse__major="1", GNU__sparse__name="b.jpg") + member("s", b"1"), "is a sparse file"),
    "of an unknown kind": (member("b.jpg", b"1", b"V"), "is a unknown kind"),
    "a name without end": (member("p", b"b" * 9000 + b".jpg", b"L") + member("s", b"1"), "has a name of 9,004 char"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_member_that_is_no_plain_file_is_left_out_and_told(tmp_path: Path, name: str) -> None:
    stored, said = LEFT_OUT[name]
    listing = listing_of(tmp_path / "x.tar", GOOD + stored + REST + END)
    assert list(listing.samples) == ["a", "z"]
    assert stored_bytes(tmp_path / "x.tar", listing.samples["z"]["txt"]) == b"nine"
    (problem,) = listing.problems
    assert said in problem.reason


def test_a_member_too_large_to_be_read_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file:  # with a hole: it takes no room on the disk
        file.write(GOOD + header("b.txt", b"%011o\0" % (17 << 20)))
        file.seek(17 << 20, io.SEEK_CUR)
        file.write(REST + END)
    listing = listed(path)
    assert list(listing.samples) == ["a", "z"]
    assert listing.problems[0].reason == "member b.txt has 17,825,792 bytes; at most 16,777,216 are read"


def test_a_thousand_extended_headers_in_a_row_are_read(tmp_path: Path) -> None:
    chain = b"".join(pax(path=f"{n}.jpg") for n in range(2000))
    assert list(listing_of(tmp_path / "x.tar", GOOD + chain + REST + END).samples) == ["a", "1999", "z"]


def test_a_name_that_is_no_utf_8_is_spelled_out(tmp_path: Path) -> None:
    stored = member(b"caf\xe9.jpg", b"1") + member(b"caf\xe9.txt", b"x")
    listing = listing_of(tmp_path / "x.tar", GOOD + stored + END)
    assert list(listing.samples) == ["a", "caf\\xe9"]
    assert listing.problems == ()
    for key in listing.samples:
        key.encode()


def test_control_characters_of_a_name_stay_out_of_messages(tmp_path: Path) -> None:
    stored = member("\x1b[31m\n.jpg", b"1") * 2
    (problem,) = listing_of(tmp_path / "x.tar", GOOD + stored + END).problems
    assert problem.reason == "member \\x1b[31m .jpg comes twice; the first one is used"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"hello" * 300, "it does not begin with a tar header"),
        (b"\xfd7zXZ\0" + bytes(900), "packed by xz: unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(900), "packed by zstd"),
        (b"BZh9" + bytes(900), "packed by bzip2"),
        (b"PK\3\4" + bytes(900), "a zip file"),
    ],
)
def test_what_is_no_tar_is_called_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(NoTarError, match=rf"x\.tar is no tar file \(.*{said}"):
        listing_of(tmp_path / "x.tar", content)


def test_whatever_one_byte_becomes_nothing_is_accepted_in_silence(tmp_path: Path) -> None:
    """As `benchmarks/robustness/damaged_shards.py` does it, for a few."""
    whole = write_shard(tmp_path / "x.tar", [sample(n, jpg=b"%d" % n, txt=f"text {n}") for n in range(3)]).read_bytes()
    before = everything(tmp_path / "x.tar")
    for at in range(0, 512, 7):
        for start in (0, 1024):
            damaged = bytearray(whole)
            damaged[start + at] ^= 1 << at % 8
            (tmp_path / "x.tar").write_bytes(damaged)
            try:
                listing = listed(tmp_path / "x.tar")
            except UserError:
                continue
            assert listing.problems or everything(tmp_path / "x.tar") == before


def everything(path: Path) -> dict[str, dict[str, bytes]]:
    return {
        key: {suffix: stored_bytes(path, extent) for suffix, extent in parts.items()}
        for key, parts in listed(path).samples.items()
    }


def test_a_stream_is_read_as_a_file_is(tmp_path: Path) -> None:
    path = tar_with(tmp_path / "x.tar", PAIRS, tarfile.PAX_FORMAT)

    class OneByOne(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(7, size or 0))

        def seek(self, *place: int) -> int:
            raise AssertionError("a stream cannot seek")

    for skip in (False, True):
        tar = headers.TarReader(OneByOne(path.read_bytes()))
        read: Callable[[headers.Member], bytes] = (lambda _: b"") if skip else tar.read
        found = [(one.name, read(one)) for one in tar]
        assert found == [(name, b"" if skip else stored) for name, stored in PAIRS]
        assert tar.tail() is None
    assert list_shard(path, "x", "y").problems == ()
