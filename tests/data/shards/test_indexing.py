"""The index: what it says of a shard, where it is kept, when it is believed, and when it is made anew."""

import gzip
import os
import shutil
from pathlib import Path

import open_clip
import pytest
from safetensors.numpy import load_file

from data.shards import indexing
from data.shards.cache import CacheConfig, ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.indexing import Indexer
from data.shards.manifest import NAME, FolderManifest, manifest_bytes, parse_manifest
from data.shards.sidecar import SUFFIX, ShardIndex, load_index, save_index
from tests.data.small_shards import picture, sample, with_json, write_shard, write_source
from vlm.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(CacheConfig(folder=str(tmp_path / "cache")))


def test_a_sidecar_tells_where_every_member_is(tmp_path: Path, cache: ShardCache) -> None:
    samples = [sample(0, jpg=picture(0), txt="one", cls=3), with_json(1, caption="two"), sample(2)]
    shard = write_shard(tmp_path / "a.tar", samples)
    made = Indexer(cache, "shards")(str(shard))
    kept = load_index(Path(str(shard) + SUFFIX))
    assert kept is not None
    stored = shard.read_bytes()
    for index in (made, kept):
        assert [index.key(row) for row in range(3)] == ["000000", "000001", "000002"]
        extents = [index.extents(row) for row in range(3)]
        assert [list(parts) for parts in extents] == [["image", "txt", "cls"], ["image", "json"], ["image", "txt"]]
        assert stored[extents[0]["txt"].offset :][: extents[0]["txt"].size] == b"one"
        assert stored[extents[1]["image"].offset :][: extents[1]["image"].size] == picture(1)
        assert len(set(index.ids.tolist())) == 3
    assert sorted(load_file(str(shard) + SUFFIX)) == ["ids", "key_ends", "keys", "offsets", "seal", "sizes"]


def test_statistics_count_texts_by_field_and_tokens_as_open_clip_does(tmp_path: Path, cache: ShardCache) -> None:
    samples = [
        sample(0, jpg=picture(0), txt="a photo of a cat"),
        with_json(1, captions=["a dog", "two dogs running over a field"], caption="ignored", url="u"),
        with_json(2, caption="", alt=["x", "y"]),
    ]
    statistics = Indexer(cache, "shards")(str(write_shard(tmp_path / "a.tar", samples))).header.statistics
    assert statistics.fields == {"txt": 1, "captions": 1, "caption": 1, "url": 1, "alt": 1}
    assert statistics.captions == 3
    tokenize = open_clip.SimpleTokenizer(context_length=77)
    lengths = [
        int((tokenize([text])[0] != 0).sum()) for text in ("a photo of a cat", "a dog", "two dogs running over a field")
    ]
    expected = [0] * (max(lengths) + 1)
    for length in lengths:
        expected[length] += 1
    assert list(statistics.tokens) == expected


def test_a_folder_is_indexed_once_and_read_from_its_manifest_afterwards(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "d", [3, 2])
    names = [str(tmp_path / "d" / f"part-{n:02d}.tar") for n in range(2)]
    first = FolderIndex(cache, "shards").load_or_build(names)
    assert [entry.samples for entry in first.values()] == [3, 2]
    assert (tmp_path / "d" / NAME).is_file()
    monkeypatch.setattr(indexing, "list_shard", None)  # nothing may open a shard any more
    assert FolderIndex(cache, "shards").load_or_build(names) == first
    (tmp_path / "d" / NAME).unlink()
    assert FolderIndex(cache, "shards").load_or_build(names) == first  # from the sidecars


def test_a_changed_shard_is_indexed_anew_and_a_removed_one_forgotten(tmp_path: Path, cache: ShardCache) -> None:
    write_source(tmp_path, [3, 2, 4])
    names = [str(tmp_path / f"part-{n:02d}.tar") for n in range(3)]
    FolderIndex(cache, "shards").load_or_build(names)
    write_shard(tmp_path / "part-01.tar", [sample(n) for n in range(50, 55)])
    (tmp_path / "part-02.tar").unlink()
    known = FolderIndex(cache, "shards").load_or_build(names[:2])
    assert [entry.samples for entry in known.values()] == [3, 5]
    manifest = parse_manifest((tmp_path / NAME).read_bytes(), NAME)
    assert {name: entry.samples for name, entry in manifest.shards.items()} == {"part-00.tar": 3, "part-01.tar": 5}


def test_where_shards_cannot_be_written_beside_the_index_is_kept_in_the_cache(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "d", [3])
    name = str(tmp_path / "d" / "part-00.tar")
    access = os.access

    def refuse(index: ShardIndex, path: Path) -> None:
        if path.parent == tmp_path / "d":
            raise PermissionError("read-only")
        save_index(index, path)

    monkeypatch.setattr(indexing, "save_index", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != f"{tmp_path}/d/" and access(path, mode))
    first = FolderIndex(cache, "shards").load_or_build([name])
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["part-00.tar"]
    monkeypatch.setattr(indexing, "list_shard", None)
    assert FolderIndex(cache, "shards").load_or_build([name]) == first
    assert Indexer(cache, "shards").find(name, cache.stamp(name)) is not None


def test_a_gzipped_shard_is_indexed_as_its_plain_copy(tmp_path: Path, cache: ShardCache) -> None:
    plain = write_shard(tmp_path / "a.tar", [sample(n) for n in range(3)])
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    ours, theirs = (Indexer(cache, "shards")(str(path)) for path in (packed, plain))
    assert ours.same_keys(theirs)
    assert (ours.offsets == theirs.offsets).all()


def test_a_damaged_sidecar_or_manifest_is_no_trap(
    tmp_path: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(n) for n in range(3)])
    Indexer(cache, "shards")(str(shard))
    sidecar = Path(str(shard) + SUFFIX)
    whole = sidecar.read_bytes()
    for damaged in (
        b"",
        whole[:5],
        whole[:100],
        whole[:-30],
        b"\xff" * 200,
        whole.replace(b"vlm-shard-index-2", b"vlm-shard-index-9"),
    ):
        sidecar.write_bytes(damaged)
        assert load_index(sidecar) is None
        assert len(Indexer(cache, "shards")(str(shard))) == 3
    for damaged in (b"", b"junk", manifest_bytes(FolderManifest())[:10]):
        with pytest.raises(UserError, match=r"^m: is no readable index .*`vlm data index --fresh` makes it$"):
            parse_manifest(damaged, "m")
        (tmp_path / NAME).write_bytes(damaged)
        with caplog.at_level("WARNING"):
            assert FolderIndex(cache, "shards").load_or_build([str(shard)])[str(shard)].samples == 3
        assert "is no readable index" in caplog.text
        assert parse_manifest((tmp_path / NAME).read_bytes(), NAME).shards["a.tar"].samples == 3


@pytest.mark.slow
def test_many_shards_are_indexed_by_several_processes(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path, [3, 2, 4, 1])
    monkeypatch.setattr(indexing, "_WORTH_A_POOL", 0)
    names = [str(tmp_path / f"part-{n:02d}.tar") for n in range(4)]
    heard: list[tuple[int, int]] = []
    known = FolderIndex(cache, "shards").load_or_build(names, workers=2, progress=lambda *done: heard.append(done))
    assert [entry.samples for entry in known.values()] == [3, 2, 4, 1]
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_manifest_moves_with_its_folder(tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "d", [3])
    FolderIndex(cache, "shards").load_or_build([str(tmp_path / "d" / "part-00.tar")])
    shutil.move(tmp_path / "d", tmp_path / "e")
    monkeypatch.setattr(indexing, "list_shard", None)
    (entry,) = FolderIndex(cache, "shards").load_or_build([str(tmp_path / "e" / "part-00.tar")]).values()
    assert entry.samples == 3
