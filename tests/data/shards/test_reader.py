"""Reading samples by shard and row: few open files, and no sample mistaken for another when a shard changes."""

import copy
import errno
import os
import pickle
from pathlib import Path

import pytest

from data.check.samples import OpenShard
from data.samples.bad_sample import BadSampleError
from data.shards.cache import CacheConfig, ShardCache
from data.shards.indexing import Indexer
from data.shards.reader import ShardReader
from data.shards.retry import RetryConfig
from data.shards.stamp import Stamp
from tests.data.small_shards import picture, sample, write_shard


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(CacheConfig(folder=str(tmp_path / "cache")))


def indexed(cache: ShardCache, *shards: Path) -> list[tuple[str, Stamp]]:
    return [(str(shard), Indexer(cache, "shards")(str(shard)).stamp) for shard in shards]


def test_a_sample_is_read_whole_or_in_part(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0), sample(1, txt="one", zip=bytes(9000), jpg=picture(1), cls=7)])
    ((name, stamp),) = indexed(cache, shard)
    reader = ShardReader(cache)
    assert reader.read(name, stamp, 1) == {"image": picture(1), "txt": b"one", "cls": b"7"}
    assert reader.read(name, stamp, 1, ("txt", "json")) == {"txt": b"one"}
    assert reader.read(name, stamp, 0, ("cls",)) == {}


def test_training_and_the_tools_take_the_same_image_of_a_sample_that_has_two(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"__key__": "both", "webp": b"w", "png": b"p", "jpg": b"j", "txt": "one"}])
    ((name, stamp),) = indexed(cache, shard)
    assert ShardReader(cache).read(name, stamp, 0, ("image",)) == {"image": b"j"}
    with OpenShard(name) as opened:
        assert [stored.image() for stored in opened] == [b"j"]


def test_a_reader_keeps_few_files_open_and_none_in_a_copy(tmp_path: Path, cache: ShardCache) -> None:
    shards = indexed(cache, *(write_shard(tmp_path / f"{n}.tar", [sample(n)]) for n in range(5)))
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(cache, max_open=2)
    for _ in range(2):
        for number, (name, stamp) in enumerate(shards):
            assert reader.read(name, stamp, 0)["image"] == picture(number)
            assert len(os.listdir("/proc/self/fd")) <= before + 4  # a mapped index keeps its file open too
    for other in (copy.copy(reader), pickle.loads(pickle.dumps(reader))):  # noqa: S301
        assert other.read(*shards[4], 0)["image"] == picture(4)
        other.close()
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_copied_anew_is_the_same_shard(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(n) for n in range(3)])
    ((name, stamp),) = indexed(cache, shard)
    os.utime(shard, ns=(1, 1))
    assert cache.stamp(name) != stamp
    assert ShardReader(cache).read(name, stamp, 2)["image"] == picture(2)


def test_a_shard_with_other_samples_gives_none_of_them(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(n) for n in range(3)])
    ((name, stamp),) = indexed(cache, shard)
    write_shard(shard, [sample(n) for n in (0, 1, 7)])
    for row in (0, 2):
        with pytest.raises(BadSampleError, match="its shard has changed since it was indexed"):
            ShardReader(cache).read(name, stamp, row)


def test_a_shard_that_is_gone_or_cut_is_an_error_of_the_system(tmp_path: Path, cache: ShardCache) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(n) for n in range(3)])
    ((name, stamp),) = indexed(cache, shard)
    reader = ShardReader(cache)
    assert reader.read(name, stamp, 0)
    os.truncate(shard, 3000)  # under the reader's eyes: the file is open
    with pytest.raises(OSError, match="ends before byte"):
        reader.read(name, stamp, 2)
    shard.unlink()
    with pytest.raises(OSError, match="is not there"):
        ShardReader(cache).read(name, stamp, 0)


def test_a_file_server_that_fails_for_a_moment_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(CacheConfig(folder=str(tmp_path / "cache")), RetryConfig(first_wait=0.001))
    shard = write_shard(tmp_path / "a.tar", [sample(n) for n in range(3)])
    ((name, stamp),) = indexed(cache, shard)
    failures = [errno.ESTALE, errno.EIO, errno.ETIMEDOUT]
    pread = os.pread

    def fail_first(*call: int) -> bytes:
        if failures and call[1] > 2:  # not the two bytes that tell a gzipped shard
            raise OSError(failures.pop(), "not now")
        return pread(*call)

    monkeypatch.setattr(os, "pread", fail_first)
    assert ShardReader(cache).read(name, stamp, 1)["image"] == picture(1)
    assert not failures
    failures += [errno.ENOSPC]
    with pytest.raises(OSError, match="not now"):
        ShardReader(cache).read(name, stamp, 1)
