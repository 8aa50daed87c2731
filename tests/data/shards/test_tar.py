"""One tar shard: grouping as webdataset does it, damage, and reading by offset."""

import io
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.shards.tar import Extent, Listing, list_shard, read_extent
from tests.data.small_shards import sample, write_shard
from vlm.errors import UserError


def tar_with(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, stored in members:
            info = tarfile.TarInfo(name)
            info.size = len(stored)
            tar.addfile(info, io.BytesIO(stored))
    return path


def listed(path: Path) -> Listing:
    return list_shard(path, str(path), "data.sources.a.shards")


def stored_bytes(path: Path, extent: Extent) -> bytes:
    with path.open("rb") as file:
        return read_extent(file.fileno(), extent)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_and_bytes_are_webdatasets(tmp_path: Path, form: int) -> None:
    deep = "folder.v2/" + "x" * 80 + "/" + "y" * 60
    stored = [
        ("a/000.jpg", b"1"),
        ("a/000.txt", b"one"),
        ("b/000.JPG", b"22"),
        ("b/000.seg.png", b"333"),
        ("é.webp", b"4444"),
        (f"{deep}.jpg", b"5"),
    ]
    path = tar_with(tmp_path / "x.tar", stored, form)
    with path.open("rb") as stream:
        members = tar_file_expander([{"url": str(path), "stream": stream}])
        expected = {
            one["__key__"]: {suffix: stored for suffix, stored in one.items() if not suffix.startswith("__")}
            for one in group_by_keys(members)
        }
    listing = listed(path)
    read = {k: {s: stored_bytes(path, e) for s, e in parts.items()} for k, parts in listing.samples.items()}
    assert read == expected
    assert len(read) == 4
    assert listing.problems == ()


def test_members_outside_the_shard_and_doubles_are_refused_and_told(tmp_path: Path) -> None:
    path = tar_with(
        tmp_path / "x.tar",
        [("/etc/passwd.txt", b"x"), ("../up.jpg", b"x"), ("a.jpg", b"first"), ("a.jpg", b"second"), (".hidden", b"x")],
    )
    listing = listed(path)
    assert list(listing.samples) == ["a"]
    assert stored_bytes(path, listing.samples["a"]["jpg"]) == b"first"
    reasons = [problem.reason for problem in listing.problems]
    assert "points outside" in reasons[0]
    assert "points outside" in reasons[1]
    assert "comes twice" in reasons[2]


def test_wherever_a_shard_is_cut_its_complete_samples_are_used_and_the_cut_is_told(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar", [sample(n) for n in range(4)])
    stored = whole.read_bytes()
    ends = {
        key: max(extent.offset + extent.size for extent in parts.values())
        for key, parts in listed(whole).samples.items()
    }
    assert listed(whole).problems == ()
    cut = tmp_path / "cut.tar"
    last_end = max(ends.values())
    for length in range(2600, last_end + 512, 211):
        cut.write_bytes(stored[:length])
        listing = listed(cut)
        complete = [key for key, end in ends.items() if end <= length]
        # Of the first sample alone nobody can tell what it lacks.
        assert [key for key in listing.samples if key != "000000"] == [key for key in complete if key != "000000"]
        assert "cut off" in listing.problems[0].reason
        assert len(listing.problems) == 1


def test_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar", [sample(n) for n in range(4)])
    listing = listed(whole)
    stored = bytearray(whole.read_bytes())
    header = listing.samples["000002"]["jpg"].offset - 512
    stored[header : header + 512] = b"\xff" * 512
    whole.write_bytes(stored)
    assert list(listed(whole).samples) == ["000000", "000001"]
    assert "damaged at byte" in listed(whole).problems[0].reason


@pytest.mark.parametrize("stored", [b"", b"this is a text file, not a tar" * 40, b"\x89PNG\r\n\x1a\n" + bytes(700)])
def test_a_file_that_is_no_tar_is_named_in_one_line(tmp_path: Path, stored: bytes) -> None:
    path = tmp_path / "photos.tar"
    path.write_bytes(stored)
    with pytest.raises(UserError, match=rf"^data\.sources\.a\.shards: {path} is no tar file \([^\n]*\)$"):
        listed(path)


def test_a_shard_shorter_than_its_index_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"12345")
    with pytest.raises(OSError, match="ends before byte 9"):
        stored_bytes(path, Extent(2, 7))
