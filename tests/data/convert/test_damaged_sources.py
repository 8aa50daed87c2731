"""Tables, folders and journals that are damaged, or meant to do harm: one line or one bad row, never another result."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.convert.builder import BuildOptions, BuildSummary, build_shards
from data.convert.columns import ColumnOptions
from data.convert.source import BuildSource
from tests.data.convert.pictures import encoded, picture, shard_bytes, write_pictures
from vlm.errors import UserError


def build(
    folder: Path,
    source: str,
    out: str = "out",
    columns: ColumnOptions | None = None,
    samples_per_shard: int = 1000,
) -> BuildSummary:
    options = BuildOptions(samples_per_shard, shuffle=None, max_bad_share=1)
    return build_shards(BuildSource(source, columns=columns or ColumnOptions()), folder / out, options, workers=1)


def write_lines(path: Path, rows: list[str]) -> str:
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("depth", [99, 200, 600, 900, 100_000])
def test_a_deeply_nested_row_is_a_bad_row(tmp_path: Path, depth: int) -> None:
    write_pictures(tmp_path, 2)
    rows = ['{"image": "000.jpg", "caption": "a dog"}']
    rows.append(f'{{"image": "001.jpg", "caption": "a cat", "x": {"[" * depth}{"]" * depth}}}')
    summary = build(tmp_path, write_lines(tmp_path / "t.jsonl", rows))
    assert (summary.num_samples, summary.num_bad) == ((2, 0) if depth < 100 else (1, 1))


def test_a_column_of_captions_is_no_column_of_images(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.jsonl", [json.dumps({"image": "a.jpg", "caption": "words " * 60})])
    with pytest.raises(UserError, match=r"none of 1 images looked for is there.*if caption is no column of paths"):
        build(tmp_path, source, columns=ColumnOptions("caption", ("caption",)))


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_pictures(images / "b", 2)
    for name in ("000", "001"):
        (images / "b" / f"{name}.txt").write_text("a dog")
    for link, target in (("x", "."), ("y", "."), ("b/up", "..")):
        (images / link).symlink_to(target)
    (images / "again").symlink_to("b")  # no loop: the user's own wish
    assert build(tmp_path, str(images)).num_samples == 4


def test_the_name_of_a_folder_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "parts[1]").mkdir()
    for number, name in enumerate(write_pictures(tmp_path / "parts[1]", 2)):
        table = pa.table({"image": [name], "caption": ["a dog"]})
        pq.write_table(table, tmp_path / "parts[1]" / f"{number}.parquet")
    assert build(tmp_path, str(tmp_path / "parts[1]" / "*.parquet")).num_samples == 2


def test_parquet_columns_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a.jpg"])] * 3, names=["image", "caption", "caption"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet: names the column 'caption' twice"):
        build(tmp_path, str(tmp_path / "twice.parquet"))
    for number, value in enumerate((1, "x")):
        pq.write_table(pa.table({"image": ["a.jpg"], "caption": ["b"], "n": [value]}), tmp_path / f"p{number}.parquet")
    with pytest.raises(UserError, match=r"p1\.parquet: its column 'n' holds String, but Int64 in .*p0\.parquet"):
        build(tmp_path, str(tmp_path / "p*.parquet"))


def test_a_flipped_bit_in_parquet_is_one_line_or_bad_rows(tmp_path: Path) -> None:
    images = [{"bytes": encoded(picture(number)), "path": f"{number}.jpg"} for number in range(6)]
    table = pa.table({"image": images, "caption": [f"caption {number}" for number in range(6)]})
    pq.write_table(table, tmp_path / "good.parquet", row_group_size=3)
    stored, draw, refused = (tmp_path / "good.parquet").read_bytes(), random.Random(0), 0
    for attempt in range(25):
        flipped = bytearray(stored)
        flipped[draw.randrange(len(stored))] ^= 1 << draw.randrange(8)
        (tmp_path / "bad.parquet").write_bytes(flipped)
        try:
            assert build(tmp_path, str(tmp_path / "bad.parquet"), f"out{attempt}").num_samples <= 6
        except UserError:
            refused += 1
    assert refused > 2


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A folder of images, and their shards in `out`, one sample each."""
    for name in write_pictures(tmp_path / "images", 3):
        (tmp_path / "images" / name).with_suffix(".txt").write_text("a dog")
    build(tmp_path, str(tmp_path / "images"), samples_per_shard=1)
    return tmp_path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"num_samples": 1', b'"num_samples": 7'),
        (b'"num_samples": 1', b'"num_samples": "x"'),
        (b'"number": 1', b'"number": 2'),
        (b'"bad": []', b'"bad": [[]'),
        (b'"number": 1', b'"number\xff: 1'),
        (b'"checksum": ', b'"chocksum": '),
    ],
)
def test_a_damaged_line_of_the_journal_is_built_again(built: Path, before: bytes, after: bytes) -> None:
    journal = built / "out" / "build-journal.jsonl"
    shards, stored = shard_bytes(built / "out"), journal.read_bytes()
    plan, *rest = stored.split(b"\n")
    journal.write_bytes(b"\n".join([plan, *(line.replace(before, after) for line in rest)]))
    assert journal.read_bytes() != stored
    assert build(built, str(built / "images"), samples_per_shard=1).num_samples == 3
    assert shard_bytes(built / "out") == shards
    assert sorted(journal.read_bytes().split(b"\n")) == sorted(stored.split(b"\n"))


@pytest.mark.parametrize("plan", [b"", b"[]", b'{"plan": []}', b'{"plan": "\xff"}', b"[" * 100_000])
def test_a_journal_without_a_plan_is_told(built: Path, plan: bytes) -> None:
    (built / "out" / "build-journal.jsonl").write_bytes(plan + b"\n")
    with pytest.raises(UserError, match=r"build-journal\.jsonl: is damaged: its first line"):
        build(built, str(built / "images"), samples_per_shard=1)


def test_a_journal_without_checksums_is_still_read(built: Path) -> None:
    journal = built / "out" / "build-journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        del line["checksum"]
    write_lines(journal, [json.dumps(line) for line in lines])
    before = {path: path.stat().st_mtime_ns for path in (built / "out").glob("*.tar")}
    assert build(built, str(built / "images"), samples_per_shard=1).num_samples == 3
    assert {path: path.stat().st_mtime_ns for path in (built / "out").glob("*.tar")} == before


def test_an_endless_caption_between_bars_costs_no_other_row(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    rows = ["image|n|comment", "000.jpg|0|a dog", f"001.jpg|0|{'x' * 140_000}", "", '002.jpg|0|a "cat']
    assert build(tmp_path, write_lines(tmp_path / "t.csv", rows)).num_samples == 3
