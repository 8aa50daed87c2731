"""Work shared among processes comes back whole and in order."""

import math

import pytest

from data.check.pool import WorkerPool

JOBS = [20_000, 1, 2, 3, 9_000, *range(4, 20)]  # the first take longest


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    with WorkerPool(workers) as pool:
        assert list(pool.in_order(math.factorial, JOBS)) == [math.factorial(job) for job in JOBS]
        with pytest.raises(ValueError, match="negative"):
            list(pool.in_order(math.factorial, [3, -1, 4]))


def test_leaving_early_drops_what_has_not_begun() -> None:
    with WorkerPool(2) as pool:
        results = pool.in_order(math.factorial, range(10**9))
        assert next(results) == 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(results)
