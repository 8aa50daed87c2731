"""Streaming without an index: it feeds a run, mixes as told, survives bad data, and says what it does not promise."""

import itertools
from collections import Counter
from pathlib import Path

import pytest

from data.config import DataConfig
from data.sequential import SequentialStream
from tests.data.small_shards import WordTokenizer, picture, sample, texts, write_shard, write_source
from vlm.batch import Batch
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.world import World


def stream(sources: dict[str, dict[str, object]], world: World | None = None, **fields: object) -> SequentialStream:
    config = DataConfig.model_validate({"sources": sources, "workers": 0, "mode": "sequential", **fields})
    return SequentialStream(config, ImageSpec(size=16), WordTokenizer(), global_batch=8, seed=0, world=world or World())


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_every_shard_is_streamed_and_the_missing_promises_are_named(tmp_path: Path) -> None:
    pattern = write_source(tmp_path, [7, 5, 9])
    data = stream({"a": {"shards": pattern, "num_samples": 21}})
    assert (data.num_samples, data.sources[0].num_shards) == (21, 3)
    batches = list(data.batches(0, 30))
    assert set(keys(batches)) == {f"{n:06d}" for n in range(21)}
    for batch in batches:
        assert batch.images.shape == (8, 3, 16, 16)
        assert texts(batch.tokens, batch.lengths) == [f"caption number {int(key)}" for key in batch.keys]
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


def test_a_source_of_unreadable_shards_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all")
    data = stream({"a": {"shards": str(tmp_path / "a.tar"), "num_samples": 5}})
    with pytest.raises(UserError, match=r"^data\.sources\.a: 101 shards in a row cannot be read; .*a\.tar$"):
        next(data.batches(0, 1))


def test_the_number_of_samples_must_be_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.sources\.a\.num_samples: `mode: sequential` counts nothing"):
        stream({"a": {"shards": write_source(tmp_path, [3])}})


def test_workers_draw_shards_of_their_own(tmp_path: Path) -> None:
    sources = {"a": {"shards": write_source(tmp_path, [20] * 6), "num_samples": 120}}
    batches = list(itertools.islice(stream(sources, workers=2).batches(0, 6), 6))
    assert [batch.step for batch in batches] == list(range(6))
    assert batches[0].keys != batches[1].keys
