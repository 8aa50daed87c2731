"""Ranks are started again after what passes, and not after what would come again."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.nodes.restarts import Restarts


def record(run: Path, **facts: Any) -> None:
    with (run / "failures.jsonl").open("a") as file:
        file.write(json.dumps({"rank": 0, "exit_code": 1, "kind": "failure", **facts}) + "\n")


def lived(restarts: Restarts, run: Path, code: int, *records: dict[str, Any]) -> tuple[bool, str, int]:
    restarts.begin()
    for facts in records:
        record(run, **facts)
    return tuple(restarts.verdict([code]))  # type: ignore[return-value]


def test_the_same_end_three_times_at_the_same_step_is_the_last(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    for life in range(3):
        gone = {"kind": "lost", "step": 7, "message": f"rank 1 on n1 (process {life}) is gone without a word"}
        goes_on, words, code = lived(restarts, tmp_path, 1, gone)
        assert goes_on == (life < 2)
    assert words.startswith("the same end 3 times at step 7, and no step more: rank 1 on n1")
    assert code == 1


@pytest.mark.parametrize(
    "between",
    [
        {"kind": "failure", "step": 8, "message": "the disk is full"},  # it came further
        {"kind": "failure", "step": 7, "message": "out of memory"},  # it is another wall
    ],
)
def test_other_ends_are_no_storm(tmp_path: Path, between: dict[str, Any]) -> None:
    restarts = Restarts(tmp_path)
    same = {"kind": "failure", "step": 7, "message": "the disk is full"}
    for one in (same, same, between, same, same):
        assert lived(restarts, tmp_path, 1, one)[0]
    assert not lived(restarts, tmp_path, 1, same)[0]


def test_a_mistake_before_the_run_began_is_not_tried_again(tmp_path: Path) -> None:
    goes_on, _, code = lived(Restarts(tmp_path), tmp_path, 2)
    assert (goes_on, code) == (False, 2)
    assert lived(Restarts(tmp_path), tmp_path, 2, {"kind": "user", "step": 3, "message": "no file"})[0]


def test_stops_by_a_signal_are_no_failures(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    assert all(lived(restarts, tmp_path, 143, {"kind": "signal", "step": 5})[0] for _ in range(9))


def test_a_death_without_a_word_is_known_by_the_last_step_that_was_logged(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n{"step": ')
    ends = [lived(restarts, tmp_path, -9) for _ in range(3)]
    assert [goes_on for goes_on, _, _ in ends] == [True, True, False]
    assert "at step 5, and no step more: a rank ended with -9 without a word" in ends[-1][1]


def test_what_a_rank_found_goes_before_what_others_heard(tmp_path: Path) -> None:
    heard = {"kind": "lost", "step": 3, "message": "rank 1 ended: no more room"}
    _, words, _ = lived(Restarts(tmp_path), tmp_path, 1, heard, {"kind": "failure", "step": 3, "message": "no room"})
    assert words == "no room"
    assert lived(Restarts(tmp_path), tmp_path, 1, heard)[1] == "no more room"
