"""Shards are the same bytes from any number of processes and through any kill, and nothing is left out in silence."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.convert.builder import BuildOptions, build_shards
from data.convert.source import BuildSource
from data.shards.cache import ShardCache
from data.shards.manifest import NAME, parse_manifest
from data.shards.sidecar import SUFFIX, load_index
from data.shards.tar import list_shard
from tests.data.convert.pictures import encoded, picture, read_shards, shard_bytes, write_pictures
from vlm.errors import UserError

PROJECT = Path(__file__).parents[3]
_BUILD = """
import sys
from pathlib import Path
from data.convert.builder import BuildOptions, build_shards
from data.convert.source import BuildSource
build_shards(BuildSource(sys.argv[1]), Path(sys.argv[2]), BuildOptions(samples_per_shard=4, size=200), workers=2)
"""


def write_table(folder: Path, count: int) -> BuildSource:
    names = write_pictures(folder, count)
    rows = "".join(f"{name},caption {number}\n" for number, name in enumerate(names))
    (folder / "table.csv").write_text("image,caption\n" + rows)
    return BuildSource(str(folder / "table.csv"))


def test_shards_are_read_by_webdataset_and_by_our_own_reader(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 10)
    summary = build_shards(source, tmp_path / "out", BuildOptions(samples_per_shard=4, prefix="train"), workers=1)
    assert [path.name for path in summary.shards] == [f"train-{n:06d}.tar" for n in range(3)]
    theirs = read_shards(tmp_path / "out")
    ours = [list_shard(path, path.name, "data") for path in summary.shards]
    assert [len(listing.samples) for listing in ours] == [4, 4, 2]
    assert not any(listing.problems for listing in ours)
    assert [key for listing in ours for key in listing.samples] == [sample["__key__"] for sample in theirs]
    assert [sample["__key__"] for sample in theirs] == [f"{n:09d}" for n in range(10)]
    for sample in theirs:
        name = sample["json"]["file_name"]
        assert sample["jpg"] == (tmp_path / "in" / name).read_bytes()
        assert sample["json"]["captions"] == [f"caption {int(name[:3])}"]
    assert summary.num_samples == 10
    assert summary.num_bytes == sum(path.stat().st_size for path in summary.shards)


def test_the_seed_decides_on_the_order_and_the_shards_hold_the_same_samples(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 40)
    orders = []
    for number, seed in enumerate((0, 0, 1, None)):
        build_shards(source, tmp_path / str(number), BuildOptions(samples_per_shard=10, shuffle=seed), workers=1)
        orders.append([sample["json"]["file_name"] for sample in read_shards(tmp_path / str(number))])
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[3] == sorted(orders[3]) == sorted(orders[0]) == sorted(orders[2])
    assert len({name[:2] for name in orders[0][:10]}) > 1  # the first shard holds more than the first rows


def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    images = [b"broken" if n == 4 else encoded(picture(n)) for n in range(10)]
    table = pa.table({"image": images, "caption": [f"caption {n}" for n in range(10)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    options = BuildOptions(samples_per_shard=2, size=10, max_bad_share=0.1)
    for workers in (1, 2):
        build_shards(BuildSource(str(tmp_path / "t.parquet")), tmp_path / str(workers), options, workers=workers)
    assert shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "2")
    assert len(shard_bytes(tmp_path / "1")) == 5
    ledgers = [(tmp_path / name / "build-ledger.jsonl").read_text() for name in ("1", "2")]
    assert ledgers[0] == ledgers[1] != ""


def test_every_shard_is_indexed_as_it_is_now(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 7)
    summary = build_shards(source, tmp_path / "out", BuildOptions(samples_per_shard=3), workers=1)
    manifest = parse_manifest((tmp_path / "out" / NAME).read_bytes(), "manifest")
    assert list(manifest.shards) == [path.name for path in summary.shards]
    for path in summary.shards:
        index = load_index(path.with_name(path.name + SUFFIX))
        assert index is not None
        assert index.stamp == ShardCache().stamp(str(path))
        assert index.header.statistics.captions == len(index) == manifest.shards[path.name].samples
    assert [manifest.shards[path.name].samples for path in summary.shards] == [3, 3, 1]


@pytest.mark.slow
def test_killed_in_the_middle_and_called_again_it_writes_what_it_would_have_written(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 100)
    for number in range(100):  # large enough that no two moments see the same state
        (tmp_path / "in" / f"{number:03d}.jpg").write_bytes(encoded(picture(number, (800, 600))))
    (tmp_path / "in" / "077.jpg").unlink()
    out = tmp_path / "out"
    command = [sys.executable, "-c", _BUILD, source.path, str(out)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while _num_journalled(out) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 5 <= len(kept) < 25
    assert not any(list_shard(path, path.name, "data").problems for path in kept)
    journal = (out / "build-journal.jsonl").read_text().splitlines()[1:]
    noted = [out / f"shard-{json.loads(line)['number']:06d}.tar" for line in journal if line.endswith("}")]
    options = BuildOptions(samples_per_shard=4, size=200)
    summary = build_shards(source, out, options, workers=1)
    build_shards(source, tmp_path / "undisturbed", options, workers=1)
    assert shard_bytes(out) == shard_bytes(tmp_path / "undisturbed")
    assert len(noted) > 0
    assert all(path.stat().st_mtime_ns == kept[path] for path in noted)  # finished shards were not written again
    assert (out / "build-ledger.jsonl").read_text() == (tmp_path / "undisturbed" / "build-ledger.jsonl").read_text()
    assert (summary.num_samples, summary.num_bad) == (99, 1)
    assert not list(out.glob(".*"))


def test_a_finished_build_is_left_alone_and_a_missing_shard_comes_back(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 6)
    options = BuildOptions(samples_per_shard=2)
    summary = build_shards(source, tmp_path / "out", options, workers=1)
    before = shard_bytes(tmp_path / "out")
    times = [path.stat().st_mtime_ns for path in summary.shards]
    (tmp_path / "in" / "000.jpg").unlink()  # whatever reads it again fails
    again = build_shards(source, tmp_path / "out", options, workers=1)
    assert again == summary
    assert [path.stat().st_mtime_ns for path in summary.shards] == times
    write_pictures(tmp_path / "in", 6)
    summary.shards[1].unlink()
    summary.shards[2].write_bytes(before["shard-000002.tar"][:1000])
    build_shards(source, tmp_path / "out", options, workers=1)
    assert shard_bytes(tmp_path / "out") == before


def test_bad_rows_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_pictures(folder, 8)
    (folder / "001.jpg").unlink()
    (folder / "002.jpg").write_bytes(b"")
    (folder / "003.jpg").write_bytes(encoded(picture(3, (99, 99)))[:-300])
    (folder / "005.jpg").unlink()
    (folder / "005.jpg").mkdir()
    captions = ["a", "b", "c", "d", "   ", "f", "g", "h"]
    labels = ["0", "1", "2", "3", "4", "5", "six", "7"]
    lines = [json.dumps({"image": f"{n:03d}.jpg", "caption": captions[n], "label": 1}) for n in range(8)]
    lines[6] = json.dumps({"image": "006.jpg", "caption": 6, "label": labels[6]})
    (folder / "t.jsonl").write_text("\n".join(lines))
    options = BuildOptions(samples_per_shard=3, shuffle=None, max_bad_share=0.8)
    summary = build_shards(BuildSource(str(folder / "t.jsonl")), tmp_path / "out", options, workers=1)
    ledger = [json.loads(line) for line in (tmp_path / "out" / "build-ledger.jsonl").read_text().splitlines()]
    assert {entry["row"]: entry["path"] for entry in ledger} == {n: f"{n:03d}.jpg" for n in range(1, 7)}
    expected = [
        "No such file",
        "0 bytes",
        "Premature end",
        "no caption",
        "its image is a folder, not a file",
        "a caption is no text but 6",
    ]
    for entry, reason in zip(ledger, expected, strict=True):
        assert reason in entry["reason"]
    assert [sample["__key__"] for sample in read_shards(tmp_path / "out")] == ["000000000", "000000007"]
    assert (summary.num_samples, summary.num_bad, sum(summary.reasons.values())) == (2, 6, 6)
    assert [path.name for path in summary.shards] == ["shard-000000.tar", "shard-000002.tar"]


def test_too_many_bad_rows_are_an_error_that_leaves_the_shards(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 10)
    (tmp_path / "in" / "003.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 10 samples \(10.0%\) .* more than max-bad-share 1.0% .*1 x its image"):
        build_shards(source, tmp_path / "out", BuildOptions(), workers=1)
    assert len(read_shards(tmp_path / "out")) == 9
    build_shards(source, tmp_path / "out", BuildOptions(max_bad_share=0.1), workers=1)


@pytest.mark.parametrize("change", [{"size": 9}, {"samples_per_shard": 3}, {"shuffle": None}, {"prefix": "other"}])
def test_another_plan_in_the_same_folder_is_refused(tmp_path: Path, change: dict[str, int | str | None]) -> None:
    source = write_table(tmp_path / "in", 4)
    build_shards(source, tmp_path / "out", BuildOptions(), workers=1)
    before = shard_bytes(tmp_path / "out")
    (name,) = change
    with pytest.raises(UserError, match=f"another build .{name} was") as caught:
        build_shards(source, tmp_path / "out", BuildOptions(**change), workers=1)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert shard_bytes(tmp_path / "out") == before


def test_a_changed_table_or_other_shards_in_the_folder_are_refused(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 4)
    build_shards(source, tmp_path / "out", BuildOptions(), workers=1)
    write_table(tmp_path / "in", 5)
    with pytest.raises(UserError, match="another build"):
        build_shards(source, tmp_path / "out", BuildOptions(), workers=1)
    (tmp_path / "out" / "build-journal.jsonl").unlink()
    with pytest.raises(UserError, match="already holds shards"):
        build_shards(source, tmp_path / "out", BuildOptions(), workers=1)


def test_members_carry_neither_time_nor_owner(tmp_path: Path) -> None:
    summary = build_shards(write_table(tmp_path / "in", 2), tmp_path / "out", BuildOptions(), workers=1)
    with tarfile.open(summary.shards[0]) as tar:
        facts = Counter((m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar)
    assert facts == {(0, 0, 0, "", "", 0o444): 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"quality": 101}, "quality must be at most 100"),
        ({"prefix": "a/b"}, "prefix names files"),
        ({"max_bad_share": 2.0}, "a share between 0 and 1"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, int | str | float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BuildOptions(**change)  # type: ignore[arg-type]


def _num_journalled(folder: Path) -> int:
    journal = folder / "build-journal.jsonl"
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


def test_an_image_that_is_no_file_is_one_bad_row(tmp_path: Path) -> None:
    source = write_table(tmp_path / "in", 2)
    (tmp_path / "in" / "001.jpg").unlink()
    os.mkfifo(tmp_path / "in" / "001.jpg")  # opening it would wait for ever
    summary = build_shards(source, tmp_path / "out", BuildOptions(max_bad_share=1), workers=1)
    assert (summary.num_samples, summary.reasons) == (1, {"its image is a FIFO, not a file": 1})
