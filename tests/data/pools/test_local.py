"""Work shared among processes comes back whole, in order or as it is done; a killed process is told."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.pools.local import LocalPool
from vlm.errors import UserError

PROJECT = Path(__file__).parents[2]
JOBS = [20_000, 1, 2, 3, 9_000, *range(4, 20)]  # the first take longest


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    with LocalPool(workers) as pool:
        assert list(pool.in_order(math.factorial, JOBS)) == [math.factorial(job) for job in JOBS]
        with pytest.raises(ValueError, match="negative"):
            list(pool.in_order(math.factorial, [3, -1, 4]))


def test_leaving_early_drops_what_has_not_begun() -> None:
    with LocalPool(2) as pool:
        results = pool.in_order(math.factorial, range(10**9))
        assert next(results) == 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(results)


def test_results_come_as_they_are_done_and_none_is_missing() -> None:
    for workers in (1, 2):
        with LocalPool(workers) as pool:
            assert sorted(pool.as_done(math.factorial, JOBS)) == sorted(math.factorial(job) for job in JOBS)


def suicide(job: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return job


def test_a_single_job_needs_no_other_process() -> None:
    with LocalPool(2) as pool:
        assert list(pool.in_order(pid, [0])) == list(pool.as_done(pid, [0])) == [os.getpid()]
        assert os.getpid() not in pool.in_order(pid, [0, 1])


def pid(_: int) -> int:
    return os.getpid()


def test_a_killed_process_ends_in_one_line() -> None:
    with LocalPool(2) as pool, pytest.raises(UserError, match=r"^a process was killed, perhaps for want of memory"):
        list(pool.as_done(suicide, range(3)))


def test_processes_that_write_and_check_shards_do_without_torch() -> None:
    program = "import sys, data.convert.builder, data.check.scan; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
