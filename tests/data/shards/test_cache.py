"""Copies of remote and gzipped shards: fetched once, whole or not at all, kept within their limit."""

import base64
import gzip
import hashlib
import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data.shards.cache import CacheConfig, ShardCache, parse_size
from data.shards.copies import Copies
from data.shards.store import RetryConfig, Stamp, UnavailableError
from data.shards.tar import list_shard
from tests.data.http_server import FaultyServer, until
from tests.data.small_shards import sample, write_shard
from vlm.errors import UserError

QUICK = RetryConfig(attempts=3, first_wait=0.001, longest_wait=0.002, silence=5)
CACHES = Callable[..., ShardCache]


def noise(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "served").mkdir()
    with FaultyServer(tmp_path / "served") as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> CACHES:
    """Makes caches in one folder, each as another process of the node would."""

    def make(limit: int | str = "1GB", retry: RetryConfig = QUICK) -> ShardCache:
        return ShardCache(CacheConfig.model_validate({"folder": str(tmp_path / "cache"), "limit": limit}), retry)

    return make


def copies(tmp_path: Path) -> set[str]:
    return {entry.name for entry in (tmp_path / "cache").iterdir()}


def in_child(work: Callable[[], object]) -> int:
    """Start `work` in a forked process; returns its id. It exits with 0 when it worked, and never hangs for long."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_local_plain_shard_is_used_as_it_is(tmp_path: Path, cache: CACHES) -> None:
    shard = write_shard(tmp_path / "a.tar", [sample(0)])
    assert cache().local(str(shard)) == shard
    assert cache().local(f"file://{shard}") == shard
    assert not (tmp_path / "cache").exists()
    opened = cache().open(str(shard))
    assert os.pread(opened.descriptor, 9, 0) == shard.read_bytes()[:9]
    assert opened.stamp == Stamp(shard.stat().st_size, f"mtime:{shard.stat().st_mtime_ns}")
    os.close(opened.descriptor)


def test_remote_shards_of_all_kinds_come_as_plain_tars(tmp_path: Path, server: FaultyServer, cache: CACHES) -> None:
    plain = write_shard(server.folder / "a.tar", [sample(n) for n in range(3)])
    packed = write_shard(server.folder / "b.tar.gz", [sample(n) for n in range(3)])
    fsspec.filesystem("memory").pipe_file("/cached/a.tar", plain.read_bytes())
    right = {plain.read_bytes(), gzip.decompress(packed.read_bytes())}
    for name in (server.url("a.tar"), server.url("b.tar.gz"), "memory://cached/a.tar", f"pipe:cat {packed}"):
        copy = cache().local(name)
        assert copy.read_bytes() in right
        assert cache().local(name) == copy
    assert server.gets("a.tar") == server.gets("b.tar.gz") == 1
    assert all(name.endswith(".tar") and len(name) == 24 + 1 + 24 + 4 for name in copies(tmp_path))


def test_a_gzipped_shard_is_unpacked_once_for_each_state(tmp_path: Path, cache: CACHES) -> None:
    shard = write_shard(tmp_path / "a.tar.gz", [sample(0)])
    copy = cache().local(str(shard))
    assert copy.read_bytes() == gzip.decompress(shard.read_bytes())
    written = copy.stat().st_ino
    assert cache().local(str(shard)).stat().st_ino == written
    write_shard(shard, [sample(0), sample(1)])
    assert cache().local(str(shard)) != copy
    assert len(copies(tmp_path)) == 2


def test_a_local_shard_replaced_while_it_is_unpacked_is_unpacked_as_it_is_now(tmp_path: Path, cache: CACHES) -> None:
    shard = tmp_path / "a.tar.gz"
    shard.write_bytes(gzip.compress(noise(5000)))

    class Replacing(threading.Event):
        """Asked between the pieces of a shard whether to stop, it replaces the shard, once."""

        def is_set(self) -> bool:
            if gzip.decompress(shard.read_bytes()) != noise(6000):
                shard.write_bytes(gzip.compress(noise(6000)))
            return False

    cache().local(str(shard), stop=Replacing())
    assert {copy.read_bytes() for copy in (tmp_path / "cache").glob("*.tar")} == {noise(6000)}


@pytest.mark.parametrize("remote", [True, False])
def test_a_shard_cut_off_while_gzipped_is_unpacked_as_far_as_it_goes(
    server: FaultyServer, cache: CACHES, remote: bool
) -> None:
    shard = write_shard(server.folder / "a.tar.gz", [sample(n) for n in range(8)])
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    copy = cache().local(server.url("a.tar.gz") if remote else str(shard))
    listing = list_shard(copy, str(shard), "shards")
    assert 0 < len(listing.samples) < 8
    assert "cut off" in listing.problems[0].reason


def test_a_store_busy_for_a_while_delays_a_shard_only(server: FaultyServer, cache: CACHES) -> None:
    (server.folder / "a.tar").write_bytes(noise(5000))
    server.fail("a.tar", 4)  # HEAD and GET of the stamp, twice
    assert cache().local(server.url("a.tar")).read_bytes() == noise(5000)


def test_a_store_that_stays_busy_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, server: FaultyServer, cache: CACHES
) -> None:
    (server.folder / "a.tar").write_bytes(noise(5000))
    server.fail("a.tar", 99)
    with pytest.raises(UnavailableError, match=r"^http://[^\n]+ 503 [^\n]+ \(3 attempts\)$"):
        cache().local(server.url("a.tar"))
    with pytest.raises(FileNotFoundError, match=r"absent\.tar is not there$"):
        cache().local(server.url("absent.tar"))
    assert not (tmp_path / "cache").exists() or not copies(tmp_path)


def test_a_dropped_connection_is_taken_up_where_it_broke(server: FaultyServer, cache: CACHES) -> None:
    data = noise(2_000_000)
    (server.folder / "a.tar").write_bytes(data)
    server.cut("a.tar", 2, after=900_000)
    assert cache().local(server.url("a.tar")).read_bytes() == data
    first, second = (int(asked.removeprefix("bytes=").removesuffix("-")) for asked in server.ranges)
    assert 0 < first < second <= 1_800_000


def test_a_store_without_ranges_is_read_again_from_the_start(server: FaultyServer, cache: CACHES) -> None:
    data = noise(2_000_000)
    (server.folder / "a.tar").write_bytes(data)
    server.knows_ranges = False
    server.cut("a.tar", 1, after=900_000)
    assert cache().local(server.url("a.tar")).read_bytes() == data
    assert server.gets("a.tar") == 2


@pytest.mark.parametrize("header", ["Content-MD5", "x-goog-hash"])
def test_a_wrong_checksum_is_never_accepted(tmp_path: Path, server: FaultyServer, cache: CACHES, header: str) -> None:
    data = noise(5000)
    (server.folder / "a.tar").write_bytes(data)
    form = "{}" if header == "Content-MD5" else "crc32c=AAAAAA==,md5={}"
    server.headers["a.tar"][header] = form.format(base64.b64encode(hashlib.md5(b"else").digest()).decode())
    with pytest.raises(UnavailableError, match=r"its MD5 is [0-9a-f]{32}, the store says [0-9a-f]{32} \(3 attempts\)$"):
        cache().local(server.url("a.tar"))
    assert server.gets("a.tar") == 3
    assert copies(tmp_path) == set()
    server.headers["a.tar"][header] = form.format(base64.b64encode(hashlib.md5(data).digest()).decode())
    assert cache().local(server.url("a.tar")).read_bytes() == data


def test_an_s3_etag_is_checked_and_one_that_is_no_md5_costs_a_second_read(server: FaultyServer, cache: CACHES) -> None:
    for name, tag in (("a.tar", hashlib.md5(noise(5000, 1)).hexdigest()), ("b.tar", "0" * 32), ("c.tar", "1" * 32)):
        (server.folder / name).write_bytes(noise(5000, 1))
        server.etags[name] = tag
        server.headers[name]["x-amz-request-id"] = "1"
    here = cache()
    assert [here.local(server.url(name)).read_bytes() for name in ("a.tar", "b.tar", "c.tar")] == [noise(5000, 1)] * 3
    # After b.tar, whose bytes came twice alike, c.tar's tag is not taken for a checksum.
    assert [server.gets(name) for name in ("a.tar", "b.tar", "c.tar")] == [1, 2, 1]


def test_a_changed_remote_shard_is_fetched_anew(server: FaultyServer, cache: CACHES) -> None:
    shard = server.folder / "a.tar"
    shard.write_bytes(noise(5000))
    before = cache().local(server.url("a.tar"))
    shard.write_bytes(noise(6000))
    after = cache().local(server.url("a.tar"))
    assert (before.read_bytes(), after.read_bytes()) == (noise(5000), noise(6000))


def test_a_shard_replaced_between_stamp_and_fetch_is_fetched_as_it_is_now(server: FaultyServer, cache: CACHES) -> None:
    shard = server.folder / "a.tar"
    shard.write_bytes(noise(5000))
    here = cache()
    old = here.stamp(server.url("a.tar"))
    shard.write_bytes(noise(6000))
    opened = here.open(server.url("a.tar"))
    assert os.pread(opened.descriptor, 9999, 0) == noise(6000)
    assert (opened.stamp.size, opened.stamp == old) == (6000, False)
    os.close(opened.descriptor)


def test_four_processes_fetch_a_shard_once(server: FaultyServer, cache: CACHES) -> None:
    (server.folder / "a.tar").write_bytes(noise(300_000))
    url = server.url("a.tar")

    def fetch() -> None:
        assert cache().local(url).read_bytes() == noise(300_000)

    with server.hold("a.tar"):
        children = [in_child(fetch) for _ in range(4)]
        assert server.waiting.acquire(timeout=20)
        until(lambda: server.requests["HEAD", "a.tar"] == 4)
        threading.Event().wait(0.2)  # time for a second GET, were there one
    assert [exit_code(child) for child in children] == [0] * 4
    assert server.gets("a.tar") == 1


def test_a_killed_fetch_leaves_no_half_copy_and_the_next_one_goes_on(
    tmp_path: Path, server: FaultyServer, cache: CACHES
) -> None:
    data = noise(40_000_000)
    (server.folder / "a.tar").write_bytes(data)
    url = server.url("a.tar")
    with server.hold("a.tar"):
        child = in_child(lambda: cache().local(url))
        assert server.waiting.acquire(timeout=20)
        until(lambda: any(entry.stat().st_size >= 16 << 20 for entry in (tmp_path / "cache").glob("*.part")))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        assert not any(name.endswith(".tar") for name in copies(tmp_path))
    assert hashlib.sha256(cache().local(url).read_bytes()).digest() == hashlib.sha256(data).digest()
    assert server.ranges == [f"bytes={16 << 20}-"]
    assert len(copies(tmp_path)) == 1


def fill(server: FaultyServer, cache: CACHES, names: str, limit: str) -> None:
    """Fetch shards of 1000 bytes, each used a second after the one before."""
    for place, name in enumerate(names):
        (server.folder / name).write_bytes(noise(1000, ord(name)))
        os.utime(cache(limit).local(server.url(name)), (place + 1, place + 1))


def held(server: FaultyServer, tmp_path: Path, names: str) -> str:
    data = {entry.read_bytes() for entry in (tmp_path / "cache").glob("*.tar")}
    return "".join(name for name in names if noise(1000, ord(name)) in data)


def test_the_copies_used_least_recently_go_first(tmp_path: Path, server: FaultyServer, cache: CACHES) -> None:
    fill(server, cache, "abc", "3kB")
    assert held(server, tmp_path, "abc") == "abc"
    cache("3kB").local(server.url("a"))  # now used last
    fill(server, cache, "d", "3kB")
    assert held(server, tmp_path, "abcd") == "acd"
    fill(server, cache, "e", "2500")
    assert len(held(server, tmp_path, "abcde")) == 2


def test_a_limit_smaller_than_a_shard_holds_one_shard(tmp_path: Path, server: FaultyServer, cache: CACHES) -> None:
    fill(server, cache, "ab", "10 B")
    assert held(server, tmp_path, "ab") == "b"
    opened = cache("10 B").open(server.url("a"))
    cache("10 B").local(server.url("b"))
    assert held(server, tmp_path, "ab") == "b"
    assert os.pread(opened.descriptor, 1000, 0) == opened.path.read_bytes() == noise(1000, ord("a"))
    os.close(opened.descriptor)


def test_unpacked_shards_count_with_their_unpacked_size(tmp_path: Path, cache: CACHES) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(gzip.compress(bytes(100_000)))
        os.utime(cache("250kB").local(str(tmp_path / name)), (ord(name), ord(name)))
    assert len(copies(tmp_path)) == 2


def test_a_part_being_written_is_kept_and_an_abandoned_one_goes(tmp_path: Path) -> None:
    folder = Copies(tmp_path / "cache", limit=1500)
    first, second, third = (folder.place(name, Stamp(1000, "")) for name in "abc")
    assert len({folder._lock_of(copy) for copy in (first, second, third)}) == 3
    with folder.writing(first), folder.appending(folder.partial_copy(first)) as write:
        write(bytes(1000))
        with folder.writing(second):
            folder.partial_copy(second).write_bytes(bytes(1000))
        folder.make_room(1000, third)
        assert folder.partial_copy(first).exists()
        assert not folder.partial_copy(second).exists()
    folder.make_room(1000, third)
    assert not folder.partial_copy(first).exists()


def test_processes_that_evict_each_others_copies_all_read_the_right_bytes(server: FaultyServer, cache: CACHES) -> None:
    for name in "abcdef":
        (server.folder / name).write_bytes(noise(1000, ord(name)))

    def read(order: str) -> None:
        here = cache("2kB")
        for name in order * 4:
            opened = here.open(server.url(name))
            assert os.pread(opened.descriptor, 2000, 0) == noise(1000, ord(name))
            os.close(opened.descriptor)

    children = [in_child(partial(read, order)) for order in ("abcdef", "fedcba", "cafebd")]
    assert [exit_code(child) for child in children] == [0] * 3


def test_a_copy_of_the_expected_state_stands_in_for_a_store_that_is_away(
    tmp_path: Path, cache: CACHES, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(noise(5000))
    with FaultyServer(tmp_path / "served") as server:
        url = server.url("a.tar")
        stamp = cache().stamp(url)
        cache().local(url)
    with caplog.at_level(logging.WARNING):
        opened = cache().open(url, stamp)
    assert os.pread(opened.descriptor, 9999, 0) == noise(5000)
    assert opened.stamp == stamp
    os.close(opened.descriptor)
    assert [record.getMessage().startswith(f"{url}: ") for record in caplog.records] == [True]
    for expected in (None, Stamp(5000, "another")):
        with pytest.raises(UnavailableError):
            cache().local(url, expected)


def test_an_unusable_folder_is_named_in_one_line(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar.gz", [sample(0)])
    (tmp_path / "file").touch()
    here = ShardCache(CacheConfig(folder=str(tmp_path / "file" / "cache")), QUICK)
    with pytest.raises(UserError, match=rf"^the cache folder {tmp_path}/file/cache cannot be used \([^\n]+\)$"):
        here.local(str(shard))


def test_a_cache_travels_to_workers_by_pickle(tmp_path: Path, server: FaultyServer, cache: CACHES) -> None:
    (server.folder / "a.tar").write_bytes(noise(5000))
    here = cache()
    here.local(server.url("a.tar"))
    there = pickle.loads(pickle.dumps(here))  # noqa: S301 (our own bytes)
    assert (there.config, there.retry) == (here.config, here.retry)
    assert there.local(server.url("a.tar")) == here.local(server.url("a.tar"))


def test_the_default_folder_follows_the_users_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert CacheConfig().path == Path("/somewhere/vlm/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert CacheConfig().path == Path.home() / ".cache/vlm/shards"
    assert CacheConfig(folder="~/x").path == Path.home() / "x"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200GB", 200 * 10**9),
        ("1.5 TiB", 3 * 2**39),
        ("64 k", 64000),
        ("10 B", 10),
        (1234, 1234),
        ("2_000MB", 2 * 10**9),
    ],
)
def test_sizes_have_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size
    assert CacheConfig.model_validate({"limit": text}).limit == size


@pytest.mark.parametrize("text", ["much", "12 XB", "-1", "", "1.5.2GB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match='such as "200GB"'):
        parse_size(text)
