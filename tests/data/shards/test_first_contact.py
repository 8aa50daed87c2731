"""A store that does not answer as a store should: the start ends in one line, after few attempts."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from data.config import DataConfig
from data.loading.sequential import SequentialStream
from data.shards.cache import CacheConfig, ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.retry import RetryConfig
from data.shards.source import open_source
from tests.data.small_shards import WordTokenizer, sample, write_shard
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec

KEY = "data.sources.web.shards"
PATIENT = RetryConfig(attempts=50, first_wait=0.001, longest_wait=0.002, silence=0.2)


class RawServer:
    """Answers each connection by a function of the first request; counts the requests."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.num_requests = 0
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/a.tar"

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536)
                self.num_requests += 1
                connection.sendall(self._answer(request))
                if not self._answer(request):
                    connection.settimeout(5)
                    connection.recv(1)  # says nothing until the other side has had enough

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@contextmanager
def served(answer: Callable[[bytes], bytes]) -> Iterator[RawServer]:
    server = RawServer(answer)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def head(status: str, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *lines, "", ""]).encode()


def announced(length: int, body: bytes) -> Callable[[bytes], bytes]:
    """A body that is not what its length says."""
    start = head("200 OK", f"Content-Length: {length}", 'ETag: "x"')
    return lambda request: start if request.startswith(b"HEAD") else start + body


WAYS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "403": (lambda _: head("403 Forbidden", "Content-Length: 0"), "may not be read"),
    "404": (lambda _: head("404 Not Found", "Content-Length: 0"), "is not there"),
    "405": (lambda _: head("405 No", "Content-Length: 0"), "the store answers 405"),
    "500": (lambda _: head("500 Oh", "Content-Length: 0"), r"the store answers 500 .*\(2 attempts\)"),
    "silent": (lambda _: b"", r"did not answer in time \(2 attempts\)"),
    "half a head": (lambda _: b"HTTP/1.1 200 OK\r\nContent-Le", r"closed the connection .*\(2 attempts\)"),
    "garbage": (lambda _: b"\x00\xff\x13 no http\n\n" * 50, "cannot be read"),
    "in circles": (lambda _: head("302 Found", "Location: /a.tar", "Content-Length: 0"), "without end"),
    "to a file": (lambda _: head("302 Found", "Location: file:///etc/passwd", "Content-Length: 0"), "cannot be read"),
    "cut": (announced(9000, b"x" * 3000), r"broke off .*\(3 attempts\)"),
    "endless head": (lambda _: b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000, "cannot be read"),
    "a web page": (announced(100, b"<html>log in</html>" + b" " * 81), "no tar file"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_store_that_does_not_answer_is_one_line_and_few_attempts(tmp_path: Path, way: str) -> None:
    answer, said = WAYS[way]
    cache = ShardCache(CacheConfig(folder=str(tmp_path / "cache")), PATIENT)
    with served(answer) as server:
        with pytest.raises(UserError, match=rf"^{KEY}: .*{said}") as error:
            open_source("web", [server.url], FolderIndex(cache, KEY))
        assert "\n" not in str(error.value)
        assert server.num_requests <= 25  # of fsspec two an attempt, and redirections


def test_nobody_listens_where_a_run_would_stream_from(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for address, said in ((f"127.0.0.1:{port}", "Connect call failed"), ("no-such-host.invalid", "cannot be read")):
        source = {"shards": f"http://{address}/a-{{0..9}}.tar", "num_samples": 10}
        config = DataConfig.model_validate(
            {
                "sources": {"web": source},
                "mode": "sequential",
                "retry": PATIENT,
                "cache": {"folder": str(tmp_path / "cache")},
            }
        )
        with pytest.raises(UserError, match=rf"^{KEY}: .*{said}"):
            SequentialStream(config, ImageSpec(size=16), WordTokenizer(), global_batch=2, seed=0, world=World())


def test_a_busy_store_is_waited_for(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "a.tar", [sample(0)]).read_bytes()
    busy = 30

    def answer(request: bytes) -> bytes:
        nonlocal busy
        busy -= 1
        if busy > 0:
            return head("503 Slow Down", "Content-Length: 0")
        return announced(len(tar), tar)(request) if b"/a.tar HTTP" in request else head("404 No", "Content-Length: 0")

    cache = ShardCache(CacheConfig(folder=str(tmp_path / "cache")), PATIENT)
    with served(answer) as server:
        assert open_source("web", [server.url], FolderIndex(cache, KEY)).num_samples == 1
