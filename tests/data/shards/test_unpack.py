"""Gzipped shards: unpacked once, cleaned up, and cut ones used as far as they go."""

import gzip
import os
import time
from pathlib import Path

import pytest

from data.shards.index import index_source
from data.shards.unpack import default_cache, plain_shard
from tests.data.small_shards import sample, write_shard
from vlm.errors import UserError


def test_a_plain_tar_is_used_as_it_is(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0)])
    assert plain_shard(shard, str(tmp_path / "cache"), "shards") == shard
    assert not (tmp_path / "cache").exists()


def test_a_gzipped_shard_is_unpacked_once_for_each_state(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar.gz", [sample(0)])
    cache = tmp_path / "cache"
    copy = plain_shard(shard, str(cache), "shards")
    assert copy.read_bytes() == gzip.decompress(shard.read_bytes())
    written = copy.stat().st_ino
    assert plain_shard(shard, str(cache), "shards").stat().st_ino == written
    write_shard(shard, [sample(0), sample(1)])
    assert plain_shard(shard, str(cache), "shards") != copy
    assert sorted(entry.suffix for entry in cache.iterdir()) == [".tar", ".tar"]


def test_copies_unused_for_a_month_go_when_another_is_written(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old, used = (
        plain_shard(write_shard(tmp_path / f"{name}.tar.gz", [sample(0)]), str(cache), "shards") for name in "ab"
    )
    for copy in (old, used):
        os.utime(copy, (time.time() - 31 * 24 * 3600,) * 2)
    plain_shard(tmp_path / "b.tar.gz", str(cache), "shards")
    plain_shard(write_shard(tmp_path / "c.tar.gz", [sample(0)]), str(cache), "shards")
    assert not old.exists()
    assert used.exists()


def test_a_gzipped_shard_that_is_cut_off_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar.gz", [sample(n) for n in range(8)])
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    index = index_source("a", [str(shard)], cache=str(tmp_path / "cache"))
    assert 0 < len(index) < 8
    assert "cut off" in index.problems[0].reason
    assert index.problems[0].shard == str(shard)


def test_an_unwritable_cache_is_named_in_one_line(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar.gz", [sample(0)])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^shards: {shard} cannot be unpacked into {tmp_path}/file/cache \([^\n]+\)$"):
        plain_shard(shard, str(tmp_path / "file" / "cache"), "shards")


def test_the_default_cache_follows_the_users_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/vlm/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/vlm/shards"
