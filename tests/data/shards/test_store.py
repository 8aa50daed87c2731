"""Names of all kinds, and stores that fail for a while, for ever, or in the middle of a file."""

import errno
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import fsspec
import pytest

from data.shards import retry
from data.shards.store import (
    RetryConfig,
    Stamp,
    UnavailableError,
    exists,
    is_remote,
    list_remote,
    open_stream,
    read_bytes,
    stamp,
    write_remote,
)
from tests.data.http_server import FaultyServer
from vlm.errors import UserError

QUICK = RetryConfig(attempts=3, first_wait=0.001, longest_wait=0.002, silence=5)
DATA = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(DATA)
    with FaultyServer(tmp_path / "served") as running:
        yield running


@pytest.mark.parametrize(
    "name", ["s3://b/k.tar", "gs://b/k", "hf://datasets/a/b", "https://h/a.tar", "memory://a", "pipe:cat a.tar"]
)
def test_urls_and_commands_are_remote(name: str) -> None:
    assert is_remote(name)


@pytest.mark.parametrize("name", ["a.tar", "/a/b.tar", "file:///a/b.tar", "~/a.tar", "a:b.tar"])
def test_paths_are_local(name: str) -> None:
    assert not is_remote(name)


def test_the_same_bytes_come_from_every_kind_of_name(tmp_path: Path, server: FaultyServer) -> None:
    path = server.folder / "a.bin"
    fsspec.filesystem("memory").pipe_file("/store/a.bin", DATA)
    for name in (str(path), f"file://{path}", server.url("a.bin"), "memory://store/a.bin", f"pipe:cat {path}"):
        assert read_bytes(name, QUICK) == DATA
        with open_stream(name, QUICK) as stream:
            assert stream.read(1000) + stream.read() == DATA
        assert exists(name, QUICK)


def test_a_stamp_changes_with_what_is_stored(tmp_path: Path, server: FaultyServer) -> None:
    path = server.folder / "a.bin"
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/store/b.bin", DATA)
    names = (str(path), server.url("a.bin"), "memory://store/b.bin")
    before = [stamp(name, QUICK) for name in names]
    assert [stamp(name, QUICK) for name in names] == before
    assert [found.size for found in before] == [len(DATA)] * 3
    path.write_bytes(DATA[:-1])
    memory.pipe_file("/store/b.bin", DATA[::-1])
    for name, old in zip(names, before, strict=True):
        assert stamp(name, QUICK) != old
    assert stamp("pipe:cat anything", QUICK) == Stamp(None, "")


def test_a_store_that_is_busy_for_a_while_is_asked_again(server: FaultyServer) -> None:
    server.fail("a.bin", 2)
    assert read_bytes(server.url("a.bin"), QUICK) == DATA
    assert server.gets("a.bin") == 3


def test_a_store_that_stays_busy_ends_in_one_line(server: FaultyServer) -> None:
    server.fail("a.bin", 99)
    url = server.url("a.bin")
    with pytest.raises(UnavailableError, match=rf"^{url} cannot be read: the store answers 503 [^\n]+ \(3 attempts\)$"):
        read_bytes(url, QUICK)
    assert server.gets("a.bin") == 3
    with pytest.raises(UnavailableError, match=r"^[^\n]+ 503 [^\n]+$"):
        exists(url, QUICK)


@pytest.mark.parametrize(("status", "kind"), [(404, FileNotFoundError), (403, PermissionError), (401, PermissionError)])
def test_a_lasting_answer_is_not_asked_for_again(server: FaultyServer, status: int, kind: type[OSError]) -> None:
    server.fail("a.bin", 1, status)
    with pytest.raises(kind, match=r"^http://[^\n]+$"):
        read_bytes(server.url("a.bin"), QUICK)
    assert server.gets("a.bin") == 1
    server.fail("b.bin", 2, status)
    assert not exists(server.url("b.bin"), QUICK)


def test_a_server_that_is_not_there_counts_as_temporary_and_is_told(tmp_path: Path) -> None:
    with FaultyServer(tmp_path) as gone:
        url = gone.url("a.bin")
    with pytest.raises(UnavailableError, match=r"^[^\n]+ \(3 attempts\)$"):
        stamp(url, QUICK)


def test_a_missing_or_forbidden_local_file_is_final(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.bin is not there$"):
        read_bytes(str(tmp_path / "absent.bin"), QUICK)
    assert not exists(str(tmp_path / "absent.bin"), QUICK)
    with pytest.raises(UnavailableError, match=r"cannot be read: Is a directory$"):
        read_bytes(str(tmp_path), QUICK)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_stream_takes_up_a_broken_connection(server: FaultyServer, ranges: bool) -> None:
    data = DATA * 200
    (server.folder / "a.bin").write_bytes(data)
    server.knows_ranges = ranges
    server.cut("a.bin", 2, after=800_000)
    with open_stream(server.url("a.bin"), QUICK) as stream:
        assert stream.read() == data
    assert server.gets("a.bin") == 3
    if ranges:
        first, second = (int(asked.removeprefix("bytes=").removesuffix("-")) for asked in server.ranges)
        assert 0 < first <= 800_000
        assert first < second <= first + 800_000


def test_a_stream_does_not_go_on_in_a_replaced_file(server: FaultyServer) -> None:
    (server.folder / "a.bin").write_bytes(DATA * 2000)
    server.cut("a.bin", 1, after=len(DATA) * 1990)
    with open_stream(server.url("a.bin"), QUICK) as stream:
        assert stream.read(10) == DATA[:10]
        (server.folder / "a.bin").write_bytes(DATA * 2001)
        with pytest.raises(UnavailableError, match="replaced"):
            stream.read()


def test_a_failing_command_is_run_again_and_told(tmp_path: Path) -> None:
    count = tmp_path / "count"
    with pytest.raises(UnavailableError, match=r"exit status 3 \(3 attempts\)$"):
        read_bytes(f"pipe:echo >> {count}; exit 3", QUICK)
    assert count.read_text() == "\n" * 3
    with pytest.raises(FileNotFoundError):
        read_bytes("pipe:no-such-command-here 2> /dev/null", QUICK)


def test_a_command_that_fails_after_its_first_bytes_is_not_taken_for_complete(tmp_path: Path) -> None:
    stream = open_stream("pipe:printf abc; exit 5", QUICK)
    with pytest.raises(UnavailableError, match="exit status 5"):
        stream.read()
    stream.close()


def test_leaving_a_command_early_is_no_error(tmp_path: Path) -> None:
    with open_stream("pipe:yes", QUICK) as stream:
        assert stream.read(2) == b"y\n"


def test_a_pattern_lists_what_the_store_holds_now() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.pipe_file(f"/listed/{name}.tar", b"x")
    assert list_remote("memory://listed/*.tar", "shards") == ["memory://listed/a.tar", "memory://listed/b.tar"]
    write_remote("memory://listed/c.tar", b"y", QUICK)
    assert list_remote("memory://listed/?.tar", "shards")[-1] == "memory://listed/c.tar"
    assert all(exists(name, QUICK) for name in list_remote("memory://listed/*.tar", "shards"))
    with pytest.raises(UserError, match=r"^shards: http://h/\*\.tar: http cannot list files; [^\n]+00099"):
        list_remote("http://h/*.tar", "shards")


def test_an_unknown_scheme_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^htps://h/a\.tar: unknown scheme htps://; nearest: https, http"):
        read_bytes("htps://h/a.tar", QUICK)


@pytest.mark.parametrize(("name", "module", "package"), [("s3://b/k", "s3fs", "s3fs"), ("gs://b/k", "gcsfs", "gcsfs")])
def test_a_scheme_without_its_package_names_the_package(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UserError, match=rf"^{name}: [^\n]+pip install {package}\)$"):
        stamp(name, QUICK)


def test_which_errors_may_pass_by_themselves() -> None:
    passing = [OSError(number, "x") for number in (errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT)]
    passing += [TimeoutError(), ConnectionResetError(), retry.TransferError("short")]
    lasting = [OSError(errno.ENOSPC, "x"), FileNotFoundError(), PermissionError(), KeyError("x"), ValueError("x")]
    assert all(map(retry.is_temporary, [*passing, aiohttp.ClientPayloadError(), aiohttp.ServerDisconnectedError()]))
    assert not any(map(retry.is_temporary, lasting))


def test_waits_double_up_to_the_longest_and_differ_between_names() -> None:
    config = RetryConfig(first_wait=1, longest_wait=6)
    for number, longest in enumerate((1, 2, 4, 6, 6), start=1):
        waits = {retry.wait(f"name {n}", number, config) for n in range(50)}
        assert len(waits) == 50
        assert longest / 2 <= min(waits) < max(waits) <= longest


def test_a_store_used_before_a_fork_works_in_the_child(server: FaultyServer) -> None:
    url = server.url("a.bin")
    assert read_bytes(url, QUICK) == DATA
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs must not hang the test
        try:
            os.write(sender, hashlib.sha256(read_bytes(url, QUICK)).digest())
        finally:
            os._exit(0)
    os.close(sender)
    os.waitpid(child, 0)
    with open(receiver, "rb") as answer:
        assert answer.read() == hashlib.sha256(DATA).digest()
    assert read_bytes(url, QUICK) == DATA
