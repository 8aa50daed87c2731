"""Jobs over a network: each is done once though workers are killed, and a stranger gets and gives nothing."""

import math
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

import pytest

from data.pools.coordinator import Coordinator, serve_jobs
from data.pools.remote import MOST_LOSSES
from vlm.errors import UserError

PROJECT = Path(__file__).parents[3]
KEY = b"the key of this test"


@contextmanager
def worker(coordinator: Coordinator) -> Iterator["subprocess.Popen[str]"]:
    program = (
        f"from data.pools.coordinator import serve_jobs; print(serve_jobs('127.0.0.1', {coordinator.port}, {KEY!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def pid(_: int) -> int:
    return os.getpid()


def killed_the_first_time(mark: Path) -> str:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def suicide(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class StubbornError(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> str:
        raise TypeError("not me")


def stubborn(_: int) -> None:
    raise StubbornError("what it says")


def test_killed_workers_lose_nothing_and_errors_come_home(tmp_path: Path) -> None:
    coordinator = Coordinator(KEY, "127.0.0.1")
    results: list[Future[int]] = [coordinator.submit(math.factorial, job) for job in range(40)]
    killed = coordinator.submit(killed_the_first_time, tmp_path / "mark")
    with worker(coordinator) as first:
        wait(results)
        first.wait(timeout=20)
        assert first.returncode == -signal.SIGKILL
        assert not killed.done()
        with worker(coordinator) as second:
            assert killed.result(timeout=20) == "done"
            negative = coordinator.submit(math.factorial, -1)
            with pytest.raises(ValueError, match="negative"):
                negative.result(timeout=20)
            with pytest.raises(UserError, match="what it says"):
                coordinator.submit(stubborn, 0).result(timeout=20)
            assert coordinator.submit(pid, 0).result(timeout=20) == second.pid
            assert coordinator.submit(os.path.abspath, "x").result(timeout=20) == os.path.abspath("x")
            coordinator.close()
            assert second.communicate(timeout=20)[0] == "5\n"
    assert [result.result() for result in results] == [math.factorial(job) for job in range(40)]


def test_a_job_that_no_worker_outlives_ends_in_one_line() -> None:
    coordinator = Coordinator(KEY, "127.0.0.1")
    lost = coordinator.submit(suicide, 0)
    peers = [_trusted(coordinator) for _ in range(MOST_LOSSES)]
    for peer in peers:  # each takes the job, and is gone
        assert peer.recv_bytes()
        peer.close()
    with pytest.raises(UserError, match=rf"^{MOST_LOSSES} workers were lost over the same job, perhaps for want of"):
        lost.result(timeout=10)
    coordinator.close()


def _trusted(coordinator: Coordinator) -> Connection:
    peer = Connection(socket.create_connection(("127.0.0.1", coordinator.port)).detach())
    answer_challenge(peer, KEY)
    deliver_challenge(peer, KEY)
    assert peer.recv() == str(Path.cwd())
    return peer


def test_a_stranger_is_given_nothing_and_nothing_of_it_is_unpickled(tmp_path: Path) -> None:
    coordinator = Coordinator(KEY, "127.0.0.1")
    waiting = coordinator.submit(math.factorial, 3)

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    stranger = Connection(socket.create_connection(("127.0.0.1", coordinator.port)).detach())
    assert b"CHALLENGE" in stranger.recv_bytes()
    stranger.send_bytes(pickle.dumps(Payload()))
    assert b"FAILURE" in stranger.recv_bytes()
    with pytest.raises((EOFError, OSError)):
        stranger.recv_bytes()
    with pytest.raises(UserError, match=r"^127.0.0.1:\d+: the coordinator there has another key$"):
        serve_jobs("127.0.0.1", coordinator.port, b"a guess")
    assert not (tmp_path / "ran").exists()
    assert not waiting.done()
    coordinator.close()
    with pytest.raises(UserError, match=r"^127.0.0.1:\d+: no coordinator answers there \("):
        serve_jobs("127.0.0.1", coordinator.port, KEY)


def test_when_none_will_come_all_that_waits_ends_with_the_reason() -> None:
    coordinator = Coordinator(KEY, "127.0.0.1")
    waiting = [coordinator.submit(math.factorial, job) for job in range(3)]
    coordinator.fail(UserError("the array has ended"))
    for result in waiting:
        with pytest.raises(UserError, match=r"^the array has ended$"):
            result.result(timeout=5)
    with pytest.raises(UserError, match=r"^the array has ended$"):
        coordinator.submit(math.factorial, 3)
    coordinator.close()
