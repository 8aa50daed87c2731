"""A run that stands still though nobody is gone: who keeps the others waiting is one line, and all ranks end."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.lives import Life, end_all, num_lines, start_ranks, wait_until
from tests.launch.tiny import write_tiny, write_tiny_recipe
from vlm.ends.hang import HANG

SECONDS = 6.0


@pytest.fixture
def lives() -> Iterator[list[Life]]:
    begun: list[Life] = []
    yield begun
    end_all(begun)


def two_ranks(folder: Path, lives: list[Life]) -> Path:
    """The directory of two ranks' run, which has come to some steps."""
    write_tiny(folder)
    run = folder / "run"
    changes: dict[str, Any] = {"duration": "100000 steps", "checkpoint_every": "100000 steps", "hang_after": SECONDS}
    recipe = write_tiny_recipe(folder, run, **changes, data={"workers": 1, "patience": 600, "max_bad_share": 1})
    lives += start_ranks(2, ["train", recipe], folder / "err")
    wait_until(lambda: num_lines(run / "metrics.jsonl") > 3)
    return run


def test_a_stopped_worker_is_named_with_its_shard_and_sample(tmp_path: Path, lives: list[Life]) -> None:
    run = two_ranks(tmp_path, lives)
    (worker,) = psutil.Process(lives[1].pid).children()
    worker.suspend()
    assert [life.ended(60) for life in lives] == [HANG, HANG]
    (line,), (other,) = (life.said for life in lives)
    step = num_lines(run / "metrics.jsonl")
    assert re.fullmatch(
        rf"vlm: no step for \d+ s \(hang_after\), the last was step {step}: rank 1 waits for loading worker 0 "
        rf"\(process {worker.pid}\), which is at step \d+: {tmp_path}/train-\w+\.tar, sample \d+; "
        rf"what each rank was doing is in {run}/hang",
        line,
    )
    assert other == f"vlm: rank 1: rank 0 ended: {line.removeprefix('vlm: ')}"
    waiting, kept = ((run / f"hang/rank-{rank}.txt").read_text() for rank in (1, 0))
    assert f"process {lives[1].pid}\nsteps done: {step}\ndoing: data\n" in waiting
    assert "data: loading worker 0 (process " in waiting
    assert re.search(r'File ".*crew\.py", line \d+ in _read', waiting)
    assert re.search(r"doing: \w.*\ncollectives: \w+ number \d+ \(\w.*\)\ndata: none is waited for\n", kept)


def test_a_stopped_rank_is_named_because_it_answers_nothing(tmp_path: Path, lives: list[Life]) -> None:
    run = two_ranks(tmp_path, lives)
    lives[1].signal(signal.SIGSTOP)
    assert lives[0].ended(60) == HANG
    (line,) = lives[0].said
    assert re.fullmatch(
        r"vlm: no step for \d+ s \(hang_after\), the last was step \d+: rank 1 on \S+ "
        rf"\(process {lives[1].pid}\) answers nothing: stopped, or cut off\?; "
        rf"what each rank was doing is in {run}/hang",
        line,
    )
    lives[1].signal(signal.SIGCONT)  # it finds that the others went on without it
    assert lives[1].ended(60) in (1, HANG)
    assert "rank 0" in lives[1].said[0]
