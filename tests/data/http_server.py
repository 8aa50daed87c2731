"""A local HTTP server that can fail as stores do: busy, cut off, silent, slow.

`python -m tests.data.http_server FOLDER` serves a folder, with `--latency SECONDS` before each answer.
"""

import argparse
import http.server
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread or process; a promise that is not kept fails here rather than hanging."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


class FaultyServer:
    """Serves `folder` on 127.0.0.1 with Content-Length, ETag and Range; counts the requests.

    Paths are relative to the folder, without a leading slash.
    """

    def __init__(self, folder: Path, latency: float = 0.0) -> None:
        self.folder = folder
        self.latency = latency
        self.requests: Counter[tuple[str, str]] = Counter()
        self.ranges: list[str] = []
        self.headers: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self.etags: dict[str, str] = {}
        self.held: dict[str, threading.Event] = {}
        self.waiting = threading.Semaphore(0)
        self.hides_etag = False
        self.knows_ranges = True
        self.failures: defaultdict[str, list[int]] = defaultdict(list)
        self.cuts: defaultdict[str, list[int]] = defaultdict(list)
        self.lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def url(self, path: str) -> str:
        """The address of a file."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/{path}"

    def gets(self, path: str) -> int:
        """How many GET requests for `path` came."""
        return self.requests["GET", path]

    def fail(self, path: str, times: int, status: int = 503) -> None:
        """Answer the next `times` requests for `path`, HEAD or GET, with `status`."""
        self.failures[path] += [status] * times

    def cut(self, path: str, times: int, after: int) -> None:
        """Close the connection of the next `times` GETs for `path` after `after` bytes of the body."""
        self.cuts[path] += [after] * times

    @contextmanager
    def hold(self, path: str) -> Iterator[None]:
        """Send half of the body of `path` and no more while the block runs; `waiting` counts those who got there."""
        self.held[path] = threading.Event()
        try:
            yield
        finally:
            self.held.pop(path).set()

    def take(self, path: str, faults: defaultdict[str, list[int]]) -> int | None:
        """The next fault for `path`, which is used up."""
        with self.lock:
            return faults[path].pop(0) if faults[path] else None

    def __enter__(self) -> "FaultyServer":
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        for event in self.held.values():
            event.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, faults: FaultyServer) -> None:
        self.faults = faults
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        assert isinstance(request, socket.socket)
        self.connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """A client that keeps its connection would go on being served."""
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    @property
    def faults(self) -> FaultyServer:
        return self.server.faults

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        with self.faults.lock:
            self.faults.requests[self.command, path] += 1
        time.sleep(self.faults.latency)
        if (status := self.faults.take(path, self.faults.failures)) is not None:
            self._empty(status)
        elif not (file := self.faults.folder / path).is_file():
            self._empty(404)
        else:
            state = file.stat()
            tag = self.faults.etags.get(path) or f"{state.st_size:x}-{state.st_mtime_ns:x}"
            self._file(path, file.read_bytes(), tag, body)

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, path: str, data: bytes, tag: str, body: bool) -> None:
        asked = self.headers.get("Range")
        start = 0
        if asked and self.faults.knows_ranges and body:
            self.faults.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").split("-")[0])
            end = int(asked.split("-")[1] or len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            part = data[start : end + 1]
        else:
            self.send_response(200)
            part = data
        self.send_header("Content-Length", str(len(part)))
        if not self.faults.hides_etag:
            self.send_header("ETag", f'"{tag}"')
        for key, value in self.faults.headers[path].items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self._send(path, part)

    def _send(self, path: str, part: bytes) -> None:
        try:
            if (after := self.faults.take(path, self.faults.cuts)) is not None:
                self.wfile.write(part[:after])
                self.close_connection = True
                return
            if (event := self.faults.held.get(path)) is not None:
                self.wfile.write(part[: len(part) // 2])
                self.wfile.flush()
                part = part[len(part) // 2 :]
                self.faults.waiting.release()
                event.wait()
            self.wfile.write(part)
        except ConnectionError:
            self.close_connection = True


def main() -> None:
    """Serve a folder until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    chosen = parser.parse_args()
    with FaultyServer(chosen.folder, chosen.latency) as server:
        print(server.url(""), flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
