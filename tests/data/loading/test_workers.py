"""Loading processes: in order, one thread each, gone when left, and quiet about users' errors."""

import os
import random
import signal
import time
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch

from data.loading.workers import WorkerInfo, load_ahead
from vlm.errors import UserError

BIG = 4_000_000  # bytes, more than a socket holds


class Work(NamedTuple):
    number: int
    process: int
    threads: int

    def pin_memory(self) -> "Work":
        return self


def work(number: int, worker: WorkerInfo) -> Work:
    worker.set_status(f"shard {number}")
    if number == 7:
        raise UserError("shard 7 is no tar")
    return Work(number, os.getpid(), torch.get_num_threads())


def broken(number: int, worker: WorkerInfo) -> Work:
    raise ZeroDivisionError(f"a mistake of ours at {number}")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_from_each_worker_in_turn(workers: int) -> None:
    results: list[Work] = list(load_ahead(work, range(10, 20), workers=workers))
    assert [result.number for result in results] == list(range(10, 20))
    processes = [result.process for result in results]
    if workers == 0:
        assert set(processes) == {os.getpid()}
    else:
        assert len(set(processes)) == workers
        assert processes == (processes[:workers] * 10)[:10]
        assert {result.threads for result in results} == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_ends_the_workers_at_once(workers: int) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    stream: Generator[Work, None, None] = load_ahead(work, range(1000, 10**9), workers=workers)
    assert next(stream).number == 1000
    stream.close()
    time.sleep(0.05)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_error_arrives_as_its_one_line(workers: int) -> None:
    stream: Generator[Work, None, None] = load_ahead(work, range(5, 20), workers=workers)
    assert [next(stream).number, next(stream).number] == [5, 6]
    with pytest.raises(UserError) as error:
        next(stream)
    assert str(error.value) == "shard 7 is no tar"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_of_ours_keeps_its_traceback(workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        next(load_ahead(broken, range(1), workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_random_generator_of_this_process_is_touched(workers: int) -> None:
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state(legacy=False))
    assert len(list(load_ahead(work, range(8, 14), workers=workers))) == 6
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state(legacy=False))) == before[1:]


def hanging(number: int, worker: WorkerInfo) -> Work:
    worker.set_status(f"step {number}: shard-{number}.tar")
    if number == 11:
        time.sleep(600)
    return work(number, worker)


def dying(number: int, worker: WorkerInfo) -> Work:
    worker.set_status(f"step {number}: shard-{number}.tar")
    if number == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(number, worker)


def test_a_worker_that_starves_its_rank_is_named_with_its_shard() -> None:
    stream: Generator[Work, None, None] = load_ahead(hanging, range(10, 30), workers=2, patience=0.3)
    assert next(stream).number == 10
    with pytest.raises(UserError, match=r"worker 1 kept this .*data\.patience.* at step 11: shard-11\.tar$"):
        next(stream)


def test_a_worker_that_died_is_named_with_its_shard() -> None:
    stream: Generator[Work, None, None] = load_ahead(dying, range(10, 30), workers=2)
    assert next(stream).number == 10
    with pytest.raises(UserError, match=r"worker 1 died \(killed\? out of memory\?\) at step 11: shard-11\.tar$"):
        next(stream)


def stopping(number: int, worker: WorkerInfo) -> Work:
    worker.set_status(f"step {number}: shard-{number}.tar")
    if number == 11:
        os.kill(os.getpid(), signal.SIGSTOP)
    return work(number, worker)


def test_a_stopped_worker_is_named_when_patience_is_over() -> None:
    stream: Generator[Work, None, None] = load_ahead(stopping, range(10, 30), workers=2, patience=0.3)
    assert next(stream).number == 10
    with pytest.raises(UserError, match=r"worker 1 kept this .*data\.patience.* at step 11: shard-11\.tar$"):
        next(stream)


class Large(NamedTuple):
    tensor: torch.Tensor

    def pin_memory(self) -> "Large":
        return Large(self.tensor.pin_memory())


def large(number: int, worker: WorkerInfo) -> Large:
    return Large(torch.full((BIG,), number, dtype=torch.uint8))


def test_a_worker_stopped_in_the_midst_of_sending_is_named_too() -> None:
    before = {child.pid for child in psutil.Process().children()}
    stream: Generator[Large, None, None] = load_ahead(large, range(10, 30), workers=1, patience=0.3)
    assert next(stream).tensor.tolist() == [10] * BIG
    (worker,) = {child.pid for child in psutil.Process().children()} - before
    while psutil.Process(worker).status() != psutil.STATUS_SLEEPING:  # it waits for room in the socket
        time.sleep(0.01)
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(UserError, match="worker 0 kept this"):
        list(stream)
    assert not psutil.pid_exists(worker)


@pytest.mark.parametrize("moment", range(6))
def test_a_worker_killed_at_any_moment_is_named_and_nothing_else_is_raised(moment: int) -> None:
    before = {child.pid for child in psutil.Process().children()}
    stream: Generator[Large, None, None] = load_ahead(large, range(10, 10_000), workers=2)
    next(stream)
    worker = min({child.pid for child in psutil.Process().children()} - before)
    for _ in range(moment):
        next(stream)
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.01)  # where a handler would raise
    with pytest.raises(UserError, match=r"^loading worker 0 died \(killed\? out of memory\?\)"):
        list(stream)


class UnsendableError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


def unsendable(number: int, worker: WorkerInfo) -> Work:
    raise UnsendableError(3, "it needs two arguments")


def test_an_exception_that_cannot_be_pickled_is_told_all_the_same() -> None:
    with pytest.raises(RuntimeError, match="UnsendableError: it needs two arguments"):
        next(load_ahead(unsendable, range(1), workers=1))


def test_workers_leave_the_signals_of_a_group_to_the_training_process() -> None:
    before = {child.pid for child in psutil.Process().children()}
    stream: Generator[Work, None, None] = load_ahead(work, range(10, 40), workers=2)
    next(stream)
    for worker in {child.pid for child in psutil.Process().children()} - before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
    assert len(list(stream)) == 29


def test_pinned_results_come_in_order_and_an_error_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned: the thread and the queue are real, the copy is a plain one."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    pinned: list[Large] = list(load_ahead(large, range(10, 16), workers=2, pinned=True))
    assert [one.tensor[0].item() for one in pinned] == list(range(10, 16))
    stream: Generator[Work, None, None] = load_ahead(work, range(5, 20), workers=2, pinned=True)
    assert [next(stream).number, next(stream).number] == [5, 6]
    with pytest.raises(UserError, match="shard 7 is no tar"):
        next(stream)
