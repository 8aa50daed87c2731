"""Shards are in the cache before they are read, without pushing out what is."""

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.shards.cache import CacheConfig, ShardCache
from data.shards.prefetch import Prefetcher
from data.shards.store import RetryConfig
from tests.data.http_server import FaultyServer, until

QUICK = RetryConfig(attempts=2, first_wait=0.001, longest_wait=0.002, silence=5)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "served").mkdir()
    for name in "abcdef":
        (tmp_path / "served" / name).write_bytes(name.encode() * 1000)
    with FaultyServer(tmp_path / "served") as running:
        yield running


def make_cache(tmp_path: Path, limit: int = 10**9, retry: RetryConfig = QUICK) -> ShardCache:
    return ShardCache(CacheConfig(folder=str(tmp_path / "cache"), limit=limit), retry)


def held(tmp_path: Path) -> str:
    """The first letters of the cached copies."""
    letters = []
    for copy in (tmp_path / "cache").glob("*.tar"):
        with copy.open() as file:
            letters.append(file.read(1))
    return "".join(sorted(letters))


def idle(prefetcher: Prefetcher) -> bool:
    with prefetcher._changed:
        done = prefetcher._full or all(name in prefetcher._sizes for name in prefetcher._wanted)
        return prefetcher._current is None and done


def test_shards_are_fetched_ahead_in_order_of_urgency(tmp_path: Path, server: FaultyServer) -> None:
    with Prefetcher(make_cache(tmp_path), most_shards=3) as prefetcher:
        prefetcher.ask([server.url(name) for name in "cabdef"])
        until(lambda: held(tmp_path) == "abc")
        until(lambda: idle(prefetcher))
    assert [path for method, path in server.requests if method == "GET"] == ["c", "a", "b"]
    before = server.gets("c")
    make_cache(tmp_path).local(server.url("c"))
    assert server.gets("c") == before


def test_a_new_list_replaces_the_old_one_and_leaves_a_shard_that_is_not_wanted(
    tmp_path: Path, server: FaultyServer
) -> None:
    (server.folder / "a").write_bytes(bytes(40_000_000))
    prefetcher = Prefetcher(make_cache(tmp_path))
    with server.hold("a"):
        prefetcher.ask([server.url("a"), server.url("b")])
        assert server.waiting.acquire(timeout=20)
        prefetcher.ask([server.url("c")])
    until(lambda: held(tmp_path) == "c")
    prefetcher.stop()
    assert held(tmp_path) == "c"
    assert server.gets("b") == 0


def test_no_more_than_its_share_is_fetched_ahead(tmp_path: Path, server: FaultyServer) -> None:
    with Prefetcher(make_cache(tmp_path, limit=5000)) as prefetcher:  # half of it: two shards of 1000 bytes
        prefetcher.ask([server.url(name) for name in "abcd"])
        until(lambda: idle(prefetcher))
        assert held(tmp_path) == "ab"
        prefetcher.ask([server.url(name) for name in "bcde"])  # a is being read
        until(lambda: idle(prefetcher))
    assert held(tmp_path) == "abc"


def test_what_cannot_be_fetched_is_left_for_the_reader(tmp_path: Path, server: FaultyServer) -> None:
    server.fail("b", 99)
    with Prefetcher(make_cache(tmp_path)) as prefetcher:
        prefetcher.ask([server.url("absent"), server.url("b"), "unknown://x", server.url("c")])
        until(lambda: idle(prefetcher))
        assert held(tmp_path) == "c"
        asked = sum(server.requests.values())
        prefetcher.ask([server.url("absent"), server.url("b"), "unknown://x", server.url("c")])
        until(lambda: idle(prefetcher))
        assert sum(server.requests.values()) == asked
    with pytest.raises(FileNotFoundError):
        make_cache(tmp_path).local(server.url("absent"))


def test_stopping_ends_a_long_wait_and_the_thread(tmp_path: Path, server: FaultyServer) -> None:
    server.fail("a", 99)
    patient = RetryConfig(attempts=9, first_wait=600, longest_wait=600)
    prefetcher = Prefetcher(make_cache(tmp_path, retry=patient))
    prefetcher.ask([server.url("a")])
    until(lambda: server.requests["GET", "a"] > 0)
    prefetcher.stop()
    assert "shard-prefetch" not in {thread.name for thread in threading.enumerate()}
    prefetcher.ask([server.url("b")])
    until(lambda: held(tmp_path) == "b")
    prefetcher.stop()


def test_a_forked_or_pickled_prefetcher_starts_its_own_thread(tmp_path: Path, server: FaultyServer) -> None:
    prefetcher = Prefetcher(make_cache(tmp_path), most_shards=1)
    prefetcher.ask([server.url("a")])
    until(lambda: held(tmp_path) == "a")
    with prefetcher._changed:  # held by the parent at the fork, as any other thread might hold it
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                prefetcher.ask([server.url("b")])
                until(lambda: held(tmp_path) == "ab")
                prefetcher.stop()
                os._exit(0)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pickle.loads(pickle.dumps(prefetcher)) as other:  # noqa: S301 (our own bytes)
        assert (other.most_shards, other.most_bytes) == (1, prefetcher.most_bytes)
        other.ask([server.url("c"), server.url("d")])
        until(lambda: held(tmp_path) == "abc")
    prefetcher.stop()
