"""Work handed out over a network to workers that come and go."""

import contextlib
import os
import pickle
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from data.pools.base import Job, Result
from data.pools.remote import MOST_LOSSES, enter, lost_too_often
from vlm.errors import UserError, reason

_HANDSHAKE = 30.0  # seconds
_SILENCE = 60  # seconds without an answer from a peer's machine, after which the peer is lost
_PROBES = 4


@dataclass
class _Task:
    pickled: bytes
    result: "Future[Any]" = field(default_factory=Future)
    losses: int = 0


class Coordinator:
    """Jobs for whoever connects and knows the key; one whose worker is lost goes to the next worker.

    Each side proves that it knows the key (HMAC) before the other reads anything but that proof from it.
    """

    def __init__(self, key: bytes, host: str = "") -> None:
        self.num_connected = 0
        self._key = key
        self._waiting: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._failure: UserError | None = None
        self._server = socket.create_server((host, 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def submit(self, work: Callable[[Job], Result], job: Job) -> "Future[Result]":
        """`work(job)` by some worker. Raises the reason why there will be none."""
        task = _Task(pickle.dumps((work, job)))
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._waiting.append(task)
            self._changed.notify()
        return task.result

    def fail(self, error: UserError) -> None:
        """End all that waits for a worker with an error: none will come."""
        with self._changed:
            self._failure = error
            left, self._waiting = self._waiting, deque()
        for task in left:
            task.result.set_exception(error)

    def close(self) -> None:
        """Let the workers go, each when it has done its job."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
        with contextlib.suppress(OSError):  # which ends the thread that waits in it; `close` alone does not
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, address = self._server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(peer, str(address[0])), daemon=True).start()

    def _serve(self, peer: socket.socket, host: str) -> None:
        connection = _connection(peer)
        alarm = threading.Timer(_HANDSHAKE, peer.shutdown, (socket.SHUT_RDWR,))
        alarm.start()
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            connection.send(os.getcwd())
        except Exception:  # whatever the bytes of one who is no worker of ours make of the handshake
            peer.close()
            return
        finally:
            alarm.cancel()
        with self._changed:
            self.num_connected += 1
        try:
            with peer, connection:
                self._hand_out(connection, host)
        finally:
            with self._changed:
                self.num_connected -= 1

    def _hand_out(self, connection: Connection, host: str) -> None:
        while (task := self._next()) is not None:
            try:
                connection.send_bytes(task.pickled)
                answer = connection.recv_bytes()
            except (EOFError, OSError) as error:
                self._lose(task, f"on {host}: {reason(error)}")
                return
            try:
                is_good, value = pickle.loads(answer)  # noqa: S301 - of a peer that has proved that it knows the key
            except Exception as error:  # whatever a class raises when it is unpickled
                is_good, value = False, error
            if is_good:
                task.result.set_result(value)
            else:
                task.result.set_exception(value)
        with contextlib.suppress(OSError):
            connection.send_bytes(b"")

    def _next(self) -> _Task | None:
        """The next job, as soon as there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            return None if self._is_closed else self._waiting.popleft()

    def _lose(self, task: _Task, ended: str) -> None:
        task.losses += 1
        if task.losses >= MOST_LOSSES:
            task.result.set_exception(lost_too_often(ended))
            return
        with self._changed:
            if not self._is_closed:
                self._waiting.appendleft(task)
                self._changed.notify()


def serve_jobs(host: str, port: int, key: bytes) -> int:
    """Work off the jobs of the coordinator at an address until it lets this process go; returns how many.

    Raises:
        UserError: no coordinator answers there, it has another key, or it is gone.
    """
    address = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=_HANDSHAKE) as peer:
            connection = _connection(peer)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        enter(connection.recv())
    except (OSError, EOFError) as error:
        raise UserError(f"{address}: no coordinator answers there ({reason(error)})") from error
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{address}: the coordinator there has another key") from error
    done = 0
    with connection:
        while True:
            try:
                asked = connection.recv_bytes()
            except (EOFError, OSError) as error:
                raise UserError(f"{address}: the coordinator is gone; this worker ends") from error
            if not asked:
                return done
            answer = _answer(asked)
            with contextlib.suppress(OSError):  # told by the next `recv`
                connection.send_bytes(answer)
            done += 1


def _answer(asked: bytes) -> bytes:
    try:
        work, job = pickle.loads(asked)  # noqa: S301 - of a peer that has proved that it knows the key
        return pickle.dumps((True, work(job)))
    except Exception as error:  # whatever the work raises is told where its result is awaited
        try:
            return pickle.dumps((False, error))
        except Exception:  # an exception that holds what cannot be pickled
            return pickle.dumps((False, UserError(f"{socket.gethostname()}: {reason(error)}")))


def _connection(peer: socket.socket) -> Connection:
    """Messages over a socket; a machine that is gone without a word is noticed after a minute."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _SILENCE // 2),
        ("TCP_KEEPINTVL", _SILENCE // 2 // _PROBES),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", _SILENCE * 1000),
    ):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(os.dup(peer.fileno()))
