"""The time of steps by phases, without that of the phases within them; and the trace of a run's steps."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from eval.report import write_report
from tests.launch.small import metrics_of
from tests.launch.tiny import train_here, write_tiny, write_tiny_recipe
from vlm.activity import activity
from vlm.errors import UserError
from vlm.training.profile import ALONGSIDE, HOOKS, REST, PhaseTimes, rows_of, span_of, table_of


def test_a_phase_counts_without_what_is_within_it_and_all_is_the_total() -> None:
    ticks: Iterator[float] = iter([0.0, 1.0, 3.0, 7.0, 8.0, 20.0, 24.0, 30.0])
    times = PhaseTimes(lambda: next(ticks))
    with times.range("towers"), times.range("decoder"):  # 1 to 8, and 3 to 7 in it
        pass
    with times.range("Checkpoints"):  # 20 to 24
        pass
    assert times.seconds == {"towers": 3.0, "decoder": 4.0, "Checkpoints": 4.0}
    rows = rows_of(times.seconds, times.total())
    assert (rows["towers"], rows["decoder"], rows[HOOKS], rows[REST]) == (3.0, 4.0, 4.0, 19.0)
    assert sum(rows.values()) == 30.0


def test_a_table_has_the_mean_the_share_and_the_slowest_rank() -> None:
    ranks = [{"towers": 3.0, REST: 1.0, ALONGSIDE: 9.0}, {"towers": 1.0, REST: 3.0, ALONGSIDE: 1.0}]
    table = table_of(ranks, 11, 14)
    assert table.rows == {"towers": [500.0, 0.5, 750.0], REST: [500.0, 0.5, 750.0], ALONGSIDE: [1250.0, 1.25, 2250.0]}
    assert span_of("100..110") == (100, 110)


@pytest.mark.slow
def test_a_run_writes_a_trace_and_a_table_of_the_steps_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path)
    run = tmp_path / "run"
    recipe = write_tiny_recipe(tmp_path, run, duration="6 steps", checkpoint_every="4 steps")
    with pytest.raises(UserError, match=r"profile\.steps: .*the first step is at least 1, and the last not before it"):
        train_here(recipe, ("profile.steps=5..3",))
    train_here(recipe, ("profile.steps=3..5",))
    assert activity.ranges is None
    assert "step 5  profile of steps 3 to 5: " in capsys.readouterr().out
    (trace,) = run.glob("profile/*.json.gz")
    assert trace.name == "steps-3-5-rank-0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    for phase in ("data", "transfer", "towers", "similarity", "backward", "optimizer", "StepLog"):
        assert names[phase] == 3, phase
    assert "aten::" in trace.with_name("steps-3-5-rank-0.txt").read_text()
    (table,) = [line["profile/phases"] for line in metrics_of(run) if "profile/phases" in line]
    assert sum(row[1] for name, row in table["rows"].items() if name != ALONGSIDE) == pytest.approx(1)
    assert all(table["rows"][name][0] > 0 for name in ("data wait", "towers", "similarity", "backward", "optimizer"))
    write_report([run], run / "again.html")
    assert "time of steps 3 to 5" in (run / "again.html").read_text()
