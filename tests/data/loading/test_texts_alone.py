"""Training data without images: none is read, samples of a text alone count, and nothing else changes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.loading.sequential import SequentialStream
from data.loading.stream import TrainStream
from data.shards import reader, tar
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.indexing import Indexer
from data.shards.manifest import NAME, FolderManifest, ShardEntry, manifest_bytes
from data.shards.sidecar import ShardIndex, save_index
from tests.data.small_shards import WordTokenizer, picture, sample, texts, with_json, write_shard, write_source
from vlm.batch import Batch
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec

IMAGE = ImageSpec(size=16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stream(pattern: str, *, global_batch: int = 6, world: World | None = None, **fields: Any) -> TrainStream:
    source = {"shards": pattern}
    config = DataConfig.model_validate({"sources": {"a": source}, "workers": 0, "images": False, **fields})
    return TrainStream(config, IMAGE, WordTokenizer(), global_batch=global_batch, seed=0, world=world or World())


def mixed(folder: Path) -> str:
    """Pairs, texts alone (txt or json), an image with a text that is damaged, one without a text, and a bare label."""
    write_source(folder, [5, 3])
    pairs = [sample(n) for n in range(20, 24)]
    alone = [sample(30, txt="alone"), sample(31, json=json.dumps({"captions": ["one", "two"]}))]
    odd = [sample(40, jpg=b"no image at all", txt="damaged"), sample(41, jpg=picture(1)), sample(42, cls="3")]
    write_shard(folder / "part-02.tar", [alone[0], *pairs[:2], alone[1], *pairs[2:], *odd])
    write_shard(folder / "part-03.tar", [sample(n, txt=f"text {n}") for n in range(50, 57)])
    return str(folder / "part-*.tar")


USABLE = [*range(8), *range(20, 24), 30, 31, 40, *range(50, 57)]


def seen(batches: list[Batch]) -> Counter[int]:
    return Counter(int(key) for batch in batches for key in batch.keys)


def test_each_text_comes_once_an_epoch_and_no_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = stream(mixed(tmp_path), global_batch=1, shuffle_shards=1, lanes=1, max_bad_share=1.0)
    assert data.num_samples == len(USABLE) + 1
    assert {(problem.key, problem.reason) for problem in data.problems} == {("000042", "it has no image, only cls")}
    read: list[int] = []

    def noted(descriptor: int, extent: tar.Extent) -> bytes:
        read.append(extent.size)
        return tar.read_extent(descriptor, extent)

    monkeypatch.setattr(reader, "read_extent", noted)
    batches = list(data.batches(0, data.num_samples))
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert [(skip.key, skip.reason) for skip in skipped] == [("000041", "it has no caption, or only empty ones")]
    counts = seen(batches)
    assert set(counts) == set(USABLE)
    assert sum(counts.values()) == len(USABLE) + 1  # one stands in for the one without a text
    for batch in batches:
        assert list(batch.parts) == ["text"]
    assert max(read) < 200  # the texts' bytes; a picture has more


def test_it_depends_neither_on_world_nor_workers_nor_restart(tmp_path: Path) -> None:
    pattern = mixed(tmp_path)

    def told(batches: list[Batch]) -> list[tuple[Any, ...]]:
        return [
            (one.step, one.keys, one.skipped, one.sample_ids.tolist(), texts(one.texts.tokens, one.texts.lengths))
            for one in batches
        ]

    whole = told(list(stream(pattern).batches(0, 9)))
    assert told(list(stream(pattern, workers=2).batches(0, 9))) == whole
    assert told(list(stream(pattern).batches(4, 5))) == whole[4:]
    ranks = [told(list(stream(pattern, world=World(rank, 4)).batches(0, 9))) for rank in range(4)]
    for step, (_, keys, skipped, ids, captions) in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        for place, expected in ((1, keys), (2, skipped), (3, ids), (4, captions)):
            assert sum((part[place] for part in parts), type(expected)()) == expected


def test_texts_of_pairs_are_those_that_training_with_images_reads(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [with_json(n, captions=[f"{n} {c}" for c in "abcde"]) for n in range(12)])
    with_images, without = (list(stream(str(shard), images=images).batches(0, 5)) for images in (True, False))
    for one, other in zip(with_images, without, strict=True):
        assert one.keys == other.keys
        assert one.sample_ids.tolist() == other.sample_ids.tolist()
        assert texts(*one_text(one)) == texts(*one_text(other))
    assert stream(str(shard)).sources[0].content == stream(str(shard), images=True).sources[0].content


def one_text(batch: Batch) -> tuple[Any, Any]:
    return batch.texts.tokens, batch.texts.lengths


def test_where_images_are_needed_nothing_has_changed(tmp_path: Path) -> None:
    data = stream(mixed(tmp_path), images=True, max_bad_share=1.0)
    assert data.num_samples == 8 + 4 + 2
    told = {(problem.key, problem.reason) for problem in data.problems}
    assert told >= {("000030", "it has no image, only txt"), ("000050", "it has no image, only txt")}
    with pytest.raises(
        UserError, match=r"no image \(jpg, jpeg, png, webp\) in .*part-03\.tar: 000050: it has no image"
    ):
        stream(str(tmp_path / "part-03.tar"), images=True)


def test_the_content_of_texts_alone_is_known(tmp_path: Path) -> None:
    def content(word: str) -> tuple[str, ...]:
        folder = tmp_path / word
        write_shard(folder / "a.tar", [sample(0), sample(1, txt=word)])
        assert stream(str(folder / "a.tar"), images=True).sources[0].content == (pairs,)
        return stream(str(folder / "a.tar"), global_batch=2).sources[0].content

    shard = write_shard(tmp_path / "pairs" / "a.tar", [sample(0)])
    (pairs,) = stream(str(shard), images=True, global_batch=1).sources[0].content
    assert content("same") == content("same")
    assert content("same") != content("other")


def without_imageless(index: ShardIndex) -> ShardIndex:
    """An index as earlier versions wrote it."""
    rows = index.num_with_image
    end = int(index.key_ends[rows - 1])
    header = index.header.model_copy(update={"imageless": None})
    return ShardIndex(
        header, index.ids[:rows], index.key_ends[:rows], index.keys[:end], index.offsets[:rows], index.sizes[:rows]
    )


def test_an_index_of_before_is_read_where_images_are_needed_and_made_anew_where_not(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0), sample(1, txt="alone"), sample(2)])
    cache = ShardCache()
    FolderIndex(cache, "a").load_or_build([str(shard)])
    old = without_imageless(Indexer(cache, "a")(str(shard)))
    save_index(old, Path(f"{shard}.idx"))
    entry = ShardEntry.of(old)
    assert entry.imageless is None
    (tmp_path / NAME).write_bytes(manifest_bytes(FolderManifest({"a.tar": entry})))
    before = (tmp_path / NAME).read_bytes()
    assert stream(str(shard), images=True, global_batch=1).num_samples == 2
    assert (tmp_path / NAME).read_bytes() == before
    data = stream(str(shard), global_batch=3)
    assert seen(list(data.batches(0, 1))) == Counter([0, 1, 2])
    assert data.problems == ()


def test_a_shard_without_texts_is_one_line(tmp_path: Path) -> None:
    bare = write_shard(tmp_path / "bare.tar", [sample(0, cls="3")])
    with pytest.raises(UserError, match=r"^data\.sources\.a\.shards: no text \(txt, json\) in .*bare\.tar: 000000"):
        stream(str(bare))
    other = write_shard(tmp_path / "other.tar", [sample(0, json=json.dumps({"alt": "x"}))])
    with pytest.raises(UserError, match=r"^data\.sources\.a: no caption field in .*expected .*; found json:alt$"):
        stream(str(other))
    found = stream(str(other), caption={"fields": {"alt": 1.0}}, global_batch=1)
    assert [texts(*one_text(batch)) for batch in found.batches(0, 1)] == [["x"]]


def test_texts_are_streamed_too(tmp_path: Path) -> None:
    source = {"shards": mixed(tmp_path), "num_samples": len(USABLE)}
    config = DataConfig.model_validate({"sources": {"a": source}, "workers": 0, "mode": "sequential", "images": False})
    data = SequentialStream(config, IMAGE, WordTokenizer(), global_batch=8, seed=0, world=World())
    batches = list(data.batches(0, 40))
    assert set(seen(batches)) == set(USABLE)
    assert all(list(batch.parts) == ["text"] for batch in batches)
    reasons = {(skip.key, skip.reason) for batch in batches for skip in batch.skipped}
    assert reasons == {("000041", "it has no text"), ("000042", "it has no text")}
