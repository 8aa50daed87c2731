"""Locks between processes that leave no file behind."""

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

from data.shards.lock import locked, locked_if_free


def count(path: Path, counter: Path, times: int) -> None:
    for _ in range(times):
        with locked(path):
            counter.write_text(str(int(counter.read_text()) + 1))


def hold_and_die(path: Path, held: Event) -> None:
    with locked(path):
        held.set()
        signal.pause()


def test_one_process_at_a_time_and_nothing_left_behind(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count, args=(tmp_path / "lock", counter, 300)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    assert counter.read_text() == "1800"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_a_killed_holder_holds_nothing_and_a_living_one_all(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=hold_and_die, args=(tmp_path / "lock", held))
    holder.start()
    assert held.wait(60)
    with locked_if_free(tmp_path / "lock") as free:
        assert not free
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    assert (tmp_path / "lock").exists()
    with locked_if_free(tmp_path / "lock") as free:
        assert free
    assert list(tmp_path.iterdir()) == []
