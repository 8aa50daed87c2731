"""Any number of ranks and workers trains on the same global batches, and so does a run that changes them on the way."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.launch.tiny import NUM_GOOD, ledger_of, sets_of, stopped_at, train_ranks, write_tiny, write_tiny_recipe

# Each world size and each number of workers once; benchmarks/robustness/resume.py runs the whole grid.
WAYS = [(2, 1), (3, 2), (4, 3)]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """A finished run of 12 steps at (world size, workers), made once."""
    folder = tmp_path_factory.mktemp("data")
    write_tiny(folder)

    @cache
    def once(world_size: int, workers: int) -> Path:
        run = tmp_path_factory.mktemp("runs") / f"{world_size}-{workers}"
        train_ranks(world_size, write_tiny_recipe(folder, run, data={"workers": workers}))
        return run

    return once


def skips_of(run: Path) -> list[tuple[int, str, str, str]]:
    """When and why samples were skipped, and what was taken instead."""
    return sorted((line["step"], line["key"], line["reason"], line["substitute"]) for line in ledger_of(run))


def test_one_process_sees_every_good_sample_once_an_epoch(finished: Callable[[int, int], Path]) -> None:
    batches = sets_of(finished(1, 0))
    assert [len(keys) for keys in batches.values()] == [12] * 12
    good = [f"{number:06d}" for number in range(NUM_GOOD)]
    skipped = [line for line in ledger_of(finished(1, 0)) if line["step"]]
    seen = sorted(key for step in range(1, 5) for key in batches[step])
    early = [line["substitute"].rpartition(":")[2] for line in skipped if line["step"] <= 4]
    for key in early:
        seen.remove(key)
    assert len(seen) == len(set(seen)) == 48 - len(early)  # 4 batches are less than an epoch of 51
    everything = {key for keys in batches.values() for key in keys}
    assert everything == set(good)
    assert {line["key"] for line in skipped} == {"000100", "000101", "000102"}


@pytest.mark.parametrize(("world_size", "workers"), WAYS)
def test_what_was_trained_on_depends_on_neither_ranks_nor_workers(
    finished: Callable[[int, int], Path], world_size: int, workers: int
) -> None:
    run, alone = finished(world_size, workers), finished(1, 0)
    assert len(list((run / "samples").iterdir())) == world_size
    assert sets_of(run) == sets_of(alone)
    assert skips_of(run) == skips_of(alone)


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_two_ranks_go_on_as_another_number_with_the_same_batches(
    finished: Callable[[int, int], Path], tmp_path: Path, world_size: int
) -> None:
    whole = finished(2, 1)
    run = stopped_at(whole, 6, tmp_path / "run")
    recipe = str(whole.with_suffix(".yaml"))
    train_ranks(world_size, recipe, f"run={run}", f"data.workers={world_size % 3}", resume="auto")
    assert sets_of(run) == sets_of(whole)
    assert skips_of(run) == skips_of(whole)
