"""No flipped bit of a line that a run appended is taken for what the run wrote."""

import json
import zlib
from pathlib import Path

import pytest

from vlm.errors import UserError
from vlm.json_lines import read_lines, sealed_line

RECORDS: list[dict[str, object]] = [
    {"step": 1, "loss": 2.5},
    {"step": 2, "loss": 2.25, "note": "é"},
    {"step": 3, "keys": ["a", "b"]},
]


def written(path: Path, records: list[dict[str, object]] = RECORDS) -> Path:
    path.write_text("".join(map(sealed_line, records)))
    return path


def test_a_line_is_json_with_the_checksum_of_the_rest_as_its_last_key(tmp_path: Path) -> None:
    line = sealed_line(RECORDS[1])
    *_, (key, value) = json.loads(line).items()
    assert (key, value) == ("crc32", f"{zlib.crc32(json.dumps(RECORDS[1]).encode()):08x}")
    assert read_lines(written(tmp_path / "log")) == (RECORDS, False)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "log")
    content = path.read_bytes()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"line \d is damaged"):
            read_lines(path)


def test_what_a_kill_tore_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "log")
    content = path.read_bytes()
    last = content[:-1].rindex(b"\n") + 1
    for end in range(last + 1, len(content)):
        path.write_bytes(content[:end])
        assert read_lines(path) == (RECORDS[:-1], True)


def test_lines_of_older_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert read_lines(tmp_path / "log") == (RECORDS, False)
