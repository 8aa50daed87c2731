"""Streaming without an index: it feeds a run, mixes as told, survives bad data, and says what it does not promise."""

import bz2
import gzip
import io
import itertools
import lzma
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import DataConfig
from data.loading.sequential import SequentialStream
from data.shards import unpack
from data.shards.cache import CacheConfig, ShardCache
from data.shards.folder_index import FolderIndex
from tests.data.shards.test_tar import tar_with
from tests.data.small_shards import WordTokenizer, picture, sample, texts, write_shard, write_source
from vlm.batch import Batch
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec


def stream(sources: dict[str, dict[str, object]], world: World | None = None, **fields: object) -> SequentialStream:
    config = DataConfig.model_validate({"sources": sources, "workers": 0, "mode": "sequential", **fields})
    return SequentialStream(config, ImageSpec(size=16), WordTokenizer(), global_batch=8, seed=0, world=world or World())


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    stored = io.BytesIO()
    with tarfile.open(fileobj=stored, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stored.getvalue()


def member_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf()


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_every_shard_is_streamed_and_the_missing_promises_are_named(tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [7, 5, 9])
    data = stream({"a": {"shards": pattern, "num_samples": 21}})
    assert (data.num_samples, data.sources[0].num_shards) == (21, 3)
    batches = list(data.batches(0, 30))
    assert set(keys(batches)) == {f"{n:06d}" for n in range(21)}
    for batch in batches:
        assert batch.pixels.shape == (8, 3, 16, 16)
        assert texts(batch.texts.tokens, batch.texts.lengths) == [f"caption number {int(key)}" for key in batch.keys]
    assert not list(tmp_path.glob("*.idx"))
    notice, *_ = data.notices
    assert all(words in notice for words in ("once an epoch", "exact resume", "ranks or workers"))


def test_ranks_and_starts_draw_differently_and_a_start_repeats_itself(tmp_path: Path) -> None:
    sources = {"a": {"shards": write_source(tmp_path, [20] * 6), "num_samples": 120}}
    first = keys(list(stream(sources).batches(0, 5)))
    assert first == keys(list(stream(sources).batches(0, 5)))
    assert first != keys(list(stream(sources).batches(5, 5)))
    ranks = [keys(list(stream(sources, World(rank, 2)).batches(0, 5))) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [20, 20]
    assert ranks[0] != ranks[1]


def test_sources_come_by_weight(tmp_path: Path) -> None:
    sources = {
        "few": {"shards": write_source(tmp_path, [5], "few"), "num_samples": 5, "weight": 3},
        "many": {"shards": write_source(tmp_path, [50], "many", 100), "num_samples": 50},
    }
    counts: Counter[str] = Counter()
    for batch in stream(sources).batches(0, 100):
        counts.update(batch.counts)
    assert counts["source/few"] + counts["source/many"] == 800
    assert abs(counts["source/few"] - 600) < 5 * (800 * 0.75 * 0.25) ** 0.5


def test_bad_samples_and_cut_shards_are_skipped_and_told(tmp_path: Path) -> None:
    write_source(tmp_path, [30])
    bad = [sample(100, jpg=b"junk", txt="x"), sample(101, txt="no image"), sample(102, jpg=picture(1), txt=b"\xff")]
    write_shard(tmp_path / "part-01.tar", [*bad, sample(103)])
    cut = write_shard(tmp_path / "part-02.tar", [sample(n) for n in range(200, 220)])
    cut.write_bytes(cut.read_bytes()[:9000])
    (tmp_path / "part-03.tar").write_bytes(b"no tar at all")
    batches = list(stream({"a": {"shards": str(tmp_path / "part-*.tar"), "num_samples": 99}}).batches(0, 40))
    reasons = {(Path(skip.shard).name, skip.key): skip.reason for batch in batches for skip in batch.skipped}
    assert "unknown format" in reasons["part-01.tar", "000100"]
    assert "no image" in reasons["part-01.tar", "000101"]
    assert "UTF-8" in reasons["part-01.tar", "000102"]
    assert "cannot be read on" in reasons["part-02.tar", ""]
    assert "cannot be read on" in reasons["part-03.tar", ""]
    assert {"000103", "000000", "000200"} <= set(keys(batches))


def mute(path: Path) -> None:
    write_shard(path, [sample(n, jpg=picture(n)) for n in range(20)])


def out_of_order(path: Path) -> None:
    """All pictures first, then all texts."""
    tar_with(path, [*((f"{n}.jpg", picture(n)) for n in range(20)), *((f"{n}.txt", b"x") for n in range(20))])


USELESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tar": (lambda path: path.write_bytes(b"no tar at all"), "the shard cannot be read on at byte 0"),
    "nothing": (lambda path: path.write_bytes(b""), "at byte 0 (nothing follows)"),
    "zeros": (lambda path: path.write_bytes(bytes(1 << 20)), "1,048,576 zeros follow byte 0"),
    "an empty tar": (lambda path: tar_with(path, []), "the shard holds no samples"),
    "no samples": (lambda path: tar_with(path, [("README", b"x"), ("a/b", b"y")]), "the shard holds no samples"),
    "no images": (lambda path: write_shard(path, [sample(n, txt="x") for n in range(20)]), "it has no image"),
    "no plain files": (lambda path: tar_with(path, [("a.npy", b"x")]), "it has no image"),
    "no captions": (mute, "500 samples in a row cannot be used (500 x it has no caption"),
    "members apart": (out_of_order, "its members lie apart, and `mode: sequential` reads only members that lie side"),
    "broken images": (
        lambda path: write_shard(path, [sample(n, jpg=b"x", txt="x") for n in range(20)]),
        "500 samples in a row cannot be used",
    ),
}


@pytest.mark.parametrize("name", USELESS)
@pytest.mark.parametrize("shards", [1, 3])
def test_what_yields_nothing_for_ever_ends_in_one_line(tmp_path: Path, name: str, shards: int) -> None:
    write, said = USELESS[name]
    for number in range(shards):
        write(tmp_path / f"{number}.tar")
    data = stream({"a": {"shards": str(tmp_path / "*.tar"), "num_samples": 5}})
    with pytest.raises(UserError, match=r"^data\.sources\.a: [^\n]* in a row [^\n]*\.tar") as error:
        next(data.batches(0, 1))
    assert said in str(error.value)


@pytest.mark.parametrize("name", USELESS)
def test_one_useless_shard_among_good_ones_ends_nothing_and_is_told(tmp_path: Path, name: str) -> None:
    USELESS[name][0](tmp_path / "bad.tar")
    write_shard(tmp_path / "good.tar", [sample(n) for n in range(100, 130)])
    data = stream({"a": {"shards": str(tmp_path / "*.tar"), "num_samples": 5}})
    batches = list(data.batches(0, 30))
    assert set(map(int, keys(batches))) <= set(range(100, 130))
    assert {Path(skip.shard).name for batch in batches for skip in batch.skipped} == {"bad.tar"}


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_shards_are_streamed_and_a_cut_one_as_far_as_it_goes(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    plain = write_shard(tmp_path / "plain", [sample(n, jpg=picture(n, (99, 99)), txt="x") for n in range(40)])
    packed = pack(plain.read_bytes())
    for stored in (packed, packed[: len(packed) // 2]) if pack is gzip.compress else (packed,):
        (tmp_path / "a.tar").write_bytes(stored)
        batches = list(stream({"a": {"shards": str(tmp_path / "a.tar"), "num_samples": 40}}).batches(0, 20))
        found, told = set(keys(batches)), {skip.reason for batch in batches for skip in batch.skipped}
        if stored is packed:
            assert (len(found), told) == (40, set())
        else:
            assert 5 < len(found) < 40
            assert all("cannot be read on" in reason for reason in told)


def test_what_unpacks_without_end_takes_no_memory_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "_MOST_BYTES", 8 << 20)
    bomb = member_header("b.jpg", 64 << 20) + bytes(64 << 20)
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar_bytes([("a.txt", b"x")])[:1024] + bomb))
    assert (tmp_path / "a.tar").stat().st_size < 100_000
    pieces = list(unpack.unzipped(io.BytesIO((tmp_path / "a.tar").read_bytes()), "a.tar"))
    assert max(map(len, pieces)) <= 1 << 20
    assert sum(map(len, pieces)) <= 200 * (tmp_path / "a.tar").stat().st_size
    data = stream({"a": {"shards": str(tmp_path / "a.tar"), "num_samples": 5}})
    with pytest.raises(UserError, match="in a row hold nothing to use"):
        next(data.batches(0, 1))
    cache = ShardCache(CacheConfig(folder=str(tmp_path / "cache")))
    (entry,) = FolderIndex(cache, "shards").load_or_build([str(tmp_path / "a.tar")]).values()
    assert (entry.samples, entry.problems) == (0, 2)  # a text without an image, and the cut


def test_the_number_of_samples_must_be_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.sources\.a\.num_samples: `mode: sequential` counts nothing"):
        stream({"a": {"shards": write_source(tmp_path, [3])}})


def test_workers_draw_shards_of_their_own(tmp_path: Path) -> None:
    sources = {"a": {"shards": write_source(tmp_path, [20] * 6), "num_samples": 120}}
    batches = list(itertools.islice(stream(sources, workers=2).batches(0, 6), 6))
    assert [batch.step for batch in batches] == list(range(6))
    assert batches[0].keys != batches[1].keys
