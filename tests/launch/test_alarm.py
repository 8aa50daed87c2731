"""An alarm warns in the run's own metrics, or stops it with one line and the checkpoint of before."""

from pathlib import Path
from typing import Any

import pytest

from tests.launch.small import metrics_of
from tests.launch.tiny import assert_same_run, stopped_at, train_here, train_ranks, write_tiny, write_tiny_recipe
from vlm.errors import UserError

# The rate rises to 0.002 at step 4, in a warm-up of four steps, and falls after it: a figure that is known beforehand.
FALL: dict[str, Any] = {"metric": "lr", "falls_by": 0.0015, "over": "12 steps"}


def test_a_warning_is_written_and_the_run_goes_on(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    train_here(write_tiny_recipe(tmp_path, tmp_path / "run", alarm=[FALL]))
    lines = metrics_of(tmp_path / "run")
    (told,) = [line for line in lines if "alarm" in line]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert max(rates.values()) - rates[told["step"]] >= 0.0015
    assert max(rates.values()) - rates[told["step"] - 1] < 0.0015
    assert told["alarm"].startswith("alarm: lr fell from 0.002 to 0.000")
    assert max(rates) == 12


@pytest.mark.slow
def test_a_stop_keeps_the_checkpoint_of_before_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Every step is saved and one is kept: the newest, and that of the best rate."""
    write_tiny(tmp_path)
    changes: dict[str, Any] = {"alarm": [{**FALL, "action": "stop"}], "checkpoint_every": "1 step"}
    alone = write_tiny_recipe(tmp_path, tmp_path / "alone", **changes, keep_checkpoints=1)
    with pytest.raises(UserError, match=r"lr fell .* the newest checkpoint of before is that of step 5"):
        train_here(alone)
    two = write_tiny_recipe(tmp_path, tmp_path / "two", **changes, keep_checkpoints=1)
    with pytest.raises(Exception, match="lr fell"):
        train_ranks(2, two)
    for run in ("alone", "two"):
        last = max(line["step"] for line in metrics_of(tmp_path / run))
        kept = sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir())
        assert kept == ["step-00000005", f"step-{last - 1:08}"]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("eval/scenes/top1", r"alarm\.0: nothing in this run measures eval/scenes/top1; choose from: geometry"),
        ("lrr", r"alarm\.0: there is no figure 'lrr'; nearest: lr"),
    ],
)
def test_an_alarm_on_nothing_is_refused_with_one_line(tmp_path: Path, metric: str, words: str) -> None:
    write_tiny(tmp_path)
    with pytest.raises(UserError, match=words):
        train_here(write_tiny_recipe(tmp_path, tmp_path / "run", alarm=[{**FALL, "metric": metric}]))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_resumed_run_warns_where_the_one_that_never_stopped_does(tmp_path: Path) -> None:
    """The best rate is of before the stop, the fall from it of after."""
    write_tiny(tmp_path)
    train_here(write_tiny_recipe(tmp_path, tmp_path / "whole", alarm=[FALL]))
    resumed = write_tiny_recipe(tmp_path, tmp_path / "resumed", alarm=[FALL])
    stopped_at(tmp_path / "whole", 6, tmp_path / "resumed")
    train_here(resumed, resume="auto")
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert [line["step"] > 6 for line in metrics_of(tmp_path / "resumed") if "alarm" in line] == [True]
