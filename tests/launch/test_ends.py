"""Whatever ends a rank is one line on each rank's standard error and in the run's record, within seconds."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.lives import Life, end_all, num_lines, start_ranks, wait_until
from tests.launch.tiny import write_tiny, write_tiny_recipe

LONG: dict[str, Any] = {"duration": "100000 steps", "checkpoint_every": "100000 steps", "keep_checkpoints": 1}
PATIENCE = 3.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny(folder)
    return folder


@pytest.fixture
def lives() -> Iterator[list[Life]]:
    begun: list[Life] = []
    yield begun
    end_all(begun)


def failures_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "failures.jsonl").read_text().splitlines()]


def only_line(life: Life) -> str:
    (line,) = life.said
    return line


def two_ranks(data: Path, run: Path, lives: list[Life], **changes: Any) -> None:
    """Two ranks in the midst of a run."""
    recipe = write_tiny_recipe(
        data, run, **LONG, **changes, data={"workers": 1, "patience": PATIENCE, "max_bad_share": 1}
    )
    lives += start_ranks(2, ["train", recipe], run.with_suffix(".err"))
    wait_until(lambda: num_lines(run / "metrics.jsonl") > 3)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_rank_names_one_that_was_killed(data: Path, tmp_path: Path, lives: list[Life], victim: int) -> None:
    two_ranks(data, tmp_path / "run", lives)
    lives[victim].signal(signal.SIGKILL)
    assert lives[1 - victim].ended(60) == 1
    line = only_line(lives[1 - victim])
    assert line.startswith("vlm: rank 1: rank 0 on " if victim == 0 else "vlm: rank 1 on ")
    assert "is gone without a word" in line
    (record,) = failures_of(tmp_path / "run")
    assert (record["rank"], record["kind"]) == (1 - victim, "lost")
