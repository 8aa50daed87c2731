"""Our own files beside shards are believed as long as every bit of them is as it was written."""

import gzip
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from data.samples.bad_sample import BadSampleError
from data.shards import manifest
from data.shards.cache import CacheConfig, ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.manifest import NAME, TEXTS, parse_manifest, parse_texts, texts_bytes
from data.shards.reader import ShardReader
from data.shards.sidecar import SUFFIX, parse_index
from data.shards.source import open_source
from launch.data_commands import data_app
from tests.data.small_shards import picture, sample, write_shard, write_source
from vlm.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(CacheConfig(folder=str(tmp_path / "cache")))


def flipped(stored: bytes, bit: int) -> bytes:
    damaged = bytearray(stored)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def indexed(folder: Path, cache: ShardCache) -> list[str]:
    write_source(folder, [3, 2])
    names = [str(folder / f"part-{n:02d}.tar") for n in range(2)]
    FolderIndex(cache, "shards").load_or_build(names)
    return names


def test_no_flipped_bit_of_an_index_is_accepted(tmp_path: Path, cache: ShardCache) -> None:
    names = indexed(tmp_path, cache)
    for file, parse in ((NAME, parse_manifest), (TEXTS, parse_texts)):
        stored = (tmp_path / file).read_bytes()
        parse(stored, file)
        for bit in range(0, 8 * len(stored), 3):
            with pytest.raises(UserError, match=rf"^{file}: is no readable index [^\n]*`vlm data index --fresh` makes"):
                parse(flipped(stored, bit), file)
    stored = Path(names[0] + SUFFIX).read_bytes()
    assert parse_index(stored, "x") is not None
    logging.disable(logging.WARNING)
    try:
        assert [bit for bit in range(0, 8 * len(stored), 5) if parse_index(flipped(stored, bit), "x")] == []
    finally:
        logging.disable(logging.NOTSET)


def test_the_checksums_are_those_of_hashlib_and_the_files_those_of_gzip_and_safetensors(
    tmp_path: Path, cache: ShardCache
) -> None:
    names = indexed(tmp_path, cache)
    first, second = gzip.decompress((tmp_path / NAME).read_bytes()).splitlines()
    assert json.loads(first)["names"] == ["part-00.tar", "part-01.tar"]
    body = (tmp_path / NAME).read_bytes()
    body = body[: body.rindex(b"\x1f\x8b\x08")]
    assert json.loads(second) == {"sha256": hashlib.sha256(body).hexdigest()}
    sidecar = Path(names[0] + SUFFIX).read_bytes()
    assert sidecar[-16:] == hashlib.sha256(sidecar[:-16]).digest()[:16]
    assert load_file(names[0] + SUFFIX)["seal"].tobytes() == sidecar[-16:]


def test_a_damaged_index_is_told_in_a_line_and_mended(
    tmp_path: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    names = indexed(tmp_path, cache)
    for file in (NAME, TEXTS):
        stored = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(flipped(stored, 8 * 40))
        caplog.clear()
        folder = FolderIndex(cache, "shards")
        assert [entry.samples for entry in folder.load_or_build(names).values()] == [3, 2]
        assert folder.statistics(names).samples == 5
        (record,) = caplog.records
        assert record.getMessage().startswith(f"{tmp_path / file}: is no readable index (")
        assert (tmp_path / file).read_bytes() == stored


@pytest.mark.parametrize("file", [NAME, TEXTS, "part-00.tar" + SUFFIX])
def test_fresh_mends_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    indexed(tmp_path / "d", ShardCache())
    stored = (tmp_path / "d" / file).read_bytes()
    for damaged in (flipped(stored, 8 * 30), b"", b"\x1f\x8b" + os.urandom(99)):
        (tmp_path / "d" / file).write_bytes(damaged)
        result = CliRunner().invoke(data_app, ["index", str(tmp_path / "d" / "*.tar"), "--fresh"])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "d" / file).read_bytes() == stored


def test_a_damaged_remote_index_is_told_and_made_anew(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.pipe("/damaged/a.tar", write_shard(tmp_path / "a.tar", [sample(n) for n in range(3)]).read_bytes())
    command = ["index", "memory://damaged/a.tar", "--workers", "1"]
    assert CliRunner().invoke(data_app, command).exit_code == 0
    stored = store.cat("/damaged/" + NAME)
    store.pipe("/damaged/" + NAME, flipped(stored, 8 * 40))
    store.pipe("/damaged/a.tar" + SUFFIX, flipped(store.cat("/damaged/a.tar" + SUFFIX), 8 * 400))
    (entry,) = FolderIndex(cache, "shards").load_or_build(["memory://damaged/a.tar"]).values()
    assert entry.samples == 3
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"memory://damaged/{NAME}: is no readable index (") for line in said)
    assert all("`vlm data index --fresh`" in line and "\n" not in line for line in said)
    assert CliRunner().invoke(data_app, [*command, "--fresh"]).exit_code == 0
    assert store.cat("/damaged/" + NAME) == stored


def test_shifted_offsets_are_noticed_and_the_right_bytes_are_read(
    tmp_path: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    (name, *_) = indexed(tmp_path, cache)
    arrays = load_file(name + SUFFIX)
    arrays["offsets"][0, 1], arrays["offsets"][1, 1] = arrays["offsets"][1, 1], arrays["offsets"][0, 1]
    with safe_open(name + SUFFIX, framework="np") as file:
        metadata = file.metadata()
    save_file(arrays, name + SUFFIX, metadata=metadata)
    stored = ShardReader(cache).read(name, cache.stamp(name), 0, ("txt",))
    assert stored == {"txt": b"caption number 0"}
    assert "is damaged (its checksum does not match)" in caplog.text


def as_first_written(folder: Path) -> None:
    """Turn a folder's index into what was written before there were checksums."""
    for file in (NAME, TEXTS):
        stored = json.loads(gzip.decompress((folder / file).read_bytes()).splitlines()[0])
        stored.get("shards", {}).pop("content", None)
        (folder / file).write_bytes(gzip.compress(json.dumps({**stored, "format": "vlm-index-1"}).encode(), mtime=0))
    for path in folder.glob("*.idx"):
        with safe_open(path, framework="np") as file:
            header = json.loads(file.metadata()["index"])
        header = {**header, "format": "vlm-shard-index-1"}
        header.pop("content")
        arrays = {name: array for name, array in load_file(path).items() if name != "seal"}
        save_file(arrays, path, metadata={"index": json.dumps(header)})


def test_an_index_without_checksums_is_made_anew_beside_local_shards_and_read_from_a_store(
    tmp_path: Path, cache: ShardCache
) -> None:
    names = indexed(tmp_path / "d", cache)
    before = {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    as_first_written(tmp_path / "d")
    old = {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    store = fsspec.filesystem("memory")
    for name, stored in old.items():
        store.pipe(f"/old/{name}", stored)
    FolderIndex(cache, "shards").load_or_build(names)
    assert {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()} == before
    remote = [f"memory://old/part-0{n}.tar" for n in range(2)]
    known = FolderIndex(cache, "shards").load_or_build(remote)
    assert [(entry.samples, entry.content) for entry in known.values()] == [(3, ""), (2, "")]
    assert not list((tmp_path / "cache").glob("*.tar"))  # nothing had to be fetched
    with pytest.raises(UserError, match="its checksum does not match"):  # the new format needs its own
        parse_manifest(before[NAME][:-40], NAME)


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["../a.tar", "b.tar"]},
        {"names": [1, 2]},
        {"shards": {"samples": [-1, 2]}},
        {"shards": {"samples": [1e9, 2]}},
        {"shards": {"samples": [2**70, 2]}},
        {"shards": {"bytes": ["1", 2]}},
        {"shards": {"version": [None, "x"]}},
        {"shards": {"problems": [[], 0]}},
        {"shards": []},
        {"shards": {"samples": [1]}},
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, cache: ShardCache, change: dict[str, object]) -> None:
    indexed(tmp_path, cache)
    stored = json.loads(gzip.decompress((tmp_path / NAME).read_bytes()).splitlines()[0])
    stored["format"] = "vlm-index-1"
    for key, value in change.items():
        stored[key] = {**stored[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=r"^i: is no readable index \([^\n]*\); `vlm"):
        parse_manifest(gzip.compress(json.dumps(stored).encode()), "i")


def test_an_index_that_unpacks_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_LARGEST", 1 << 20)
    with pytest.raises(UserError, match="cut off, or too large"):
        parse_manifest(gzip.compress(bytes(2 << 20)), "i")


def test_what_indexing_found_is_told_though_its_sidecar_is_damaged(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0), sample(1, txt="alone")])
    source = open_source("a", [str(shard)], FolderIndex(cache, "shards"))
    sidecar = Path(str(shard) + SUFFIX)
    sidecar.write_bytes(flipped(sidecar.read_bytes(), 99))
    assert [problem.key for problem in source.problems(cache)] == ["000001"]


def test_a_shard_replaced_by_one_of_the_same_size_and_time_gives_none_of_its_samples(
    tmp_path: Path, cache: ShardCache
) -> None:
    (name, *_) = indexed(tmp_path, cache)
    stamp, state = cache.stamp(name), os.stat(name)
    for start, said in ((50, "holds other samples"), (0, "")):
        pictures = [sample(start + n, jpg=picture(7 + n) + bytes(n), txt=f"caption number {n}") for n in range(3)]
        write_shard(Path(name), pictures)
        os.utime(name, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert cache.stamp(name) == stamp
        if said:
            with pytest.raises(BadSampleError, match="its shard has changed since it was indexed"):
                ShardReader(cache).read(name, stamp, 1)
        else:  # the same keys at other places
            assert ShardReader(cache).read(name, stamp, 1)["image"] == picture(8) + bytes(1)


def test_samples_that_only_the_index_of_the_folder_knows_are_bad_ones(tmp_path: Path, cache: ShardCache) -> None:
    (name, *_) = indexed(tmp_path, cache)
    stamp = cache.stamp(name)
    with pytest.raises(BadSampleError, match="fewer samples than its folder's index says"):
        ShardReader(cache).read(name, stamp, 3)


@pytest.mark.parametrize(
    "lie",
    [{"tokens": (2**70,)}, {"tokens": (-5,)}, {"tokens": (1,) * 1000}, {"captions": -3}, {"fields": {"x": 2**80}}],
)
def test_statistics_that_cannot_be_are_found_out_anew(tmp_path: Path, lie: dict[str, Any]) -> None:
    """A right checksum around them: whoever wrote them meant it."""
    pattern = write_source(tmp_path, [3])
    true = open_source("a", [pattern], FolderIndex(ShardCache(), "a")).statistics
    kept = tmp_path / TEXTS
    ((name, stored),) = parse_texts(kept.read_bytes(), "t").items()
    kept.write_bytes(texts_bytes({name: stored.model_copy(update=lie)}))
    assert open_source("a", [pattern], FolderIndex(ShardCache(), "a")).statistics == true
