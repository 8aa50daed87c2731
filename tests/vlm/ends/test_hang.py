"""Who keeps the others waiting, by what each rank says of itself; and when a rank that is asked nothing says so."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from vlm.activity import activity, awaiting, collective, phase
from vlm.ends.hang import HangWatch, who_keeps_them

USUAL: dict[str, Any] = {"step": 4, "entered": 70, "doing": "similarity", "awaited": "", "where": "a.py:1"}


def report(rank: int, **changes: Any) -> dict[str, Any]:
    return {"rank": rank, **USUAL, **changes}


@pytest.mark.parametrize(
    ("reports", "silent", "who"),
    [
        (
            [report(0), report(2)],
            {1: " on here (process 5)"},
            "rank 1 on here (process 5) answers nothing: stopped",
        ),
        ([report(0), report(1, entered=60, awaited="loading worker 3")], {}, "rank 1 waits for loading worker 3"),
        (
            [report(0), report(1, entered=69, doing="Checkpoints", where="b.py:2"), report(2)],
            {},
            "rank 1 is in Checkpoints, at b.py:2, and the others wait for it further on",
        ),
        ([report(0), report(1, step=3, entered=80)], {}, "rank 1 is in similarity, at a.py:1, and the others wait"),
        ([report(0), report(1)], {}, "all ranks are in similarity, at a.py:1: a network that stands?"),
        ([report(0)], {}, "it is in similarity, at a.py:1"),
    ],
)
def test_who_keeps_the_others_waiting(reports: list[dict[str, Any]], silent: Mapping[int, str], who: str) -> None:
    assert who_keeps_them(reports, silent).startswith(who)


@pytest.fixture
def stood() -> Iterator[None]:
    """This process has done nothing for a while, in a collective."""
    activity.touch()
    activity.alive -= 100
    with phase("backward"), collective("sum"), awaiting(lambda: "worker 1"):
        yield
    activity.touch()


def nobody() -> dict[int, str]:
    return {}


def test_a_rank_that_nobody_asks_says_so_and_one_that_is_asked_leaves_it_to_rank_0(tmp_path: Path, stood: None) -> None:
    asked, unasked = (HangWatch(20.0, tmp_path, rank=1, size=2) for _ in range(2))
    told = asked.report()
    assert told["doing"] == f"backward > communication (collective {activity.collectives}, sum)"
    assert told["awaited"] == "worker 1"
    assert told["where"].startswith("hang.py:")  # the main thread is the one that asks here
    assert asked.check(lambda: None, nobody) is None
    line = unasked.check(lambda: None, lambda: {0: " on there"})
    assert line is not None
    assert "no step for 100 s (hang_after)" in line
    assert "rank 0 on there asks nobody: stopped, or cut off?" in line
    written = (tmp_path / "hang/rank-1.txt").read_text()
    assert "doing: backward > communication\n" in written
    assert "data: worker 1\n" in written


def test_work_with_slack_and_a_process_that_was_stopped_itself_are_no_hangs(tmp_path: Path, stood: None) -> None:
    activity.slack = 10.0
    assert HangWatch(20.0, tmp_path, rank=0, size=1).check(lambda: None, nobody) is None
    activity.slack = 1.0
    watch = HangWatch(20.0, tmp_path, rank=0, size=1)
    watch._checked = time.monotonic() - 100
    assert watch.check(lambda: None, nobody) is None
    assert time.monotonic() - activity.alive < 10
    activity.alive -= 100
    line = watch.check(lambda: None, nobody)
    assert line is not None
    assert "rank 0 waits for worker 1; what each rank was doing is in" in line
