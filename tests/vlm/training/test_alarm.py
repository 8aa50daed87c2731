"""When an alarm goes off: far enough, within the stretch, with its companion, once a movement."""

from typing import Any

import pytest
from pydantic import ValidationError

from vlm.duration import Duration
from vlm.errors import EveryRankError
from vlm.training.alarm import Alarm, AlarmConfig, Alarms, Movement, require_known


def alarms(**fields: Any) -> Alarms:
    config = AlarmConfig.model_validate({"metric": "top1", "over": "10 steps", **fields})
    return Alarms((config,), lambda duration: duration.steps(1, 1))


def raised_by(watching: Alarms, metric: str, values: list[float], every: int = 1) -> list[int]:
    """The steps at which alarms go off; the values are logged `every` so many steps from step 1 on."""
    steps = [1 + number * every for number in range(len(values))]
    return [step for step, value in zip(steps, values, strict=True) if watching.observe(step, {metric: value})]


def test_a_fall_from_the_best_in_the_stretch() -> None:
    assert raised_by(alarms(falls_by=0.2), "top1", [0.5, 0.6, 0.55, 0.45, 0.41, 0.39]) == [6]
    assert raised_by(alarms(falls_by=0.25), "top1", [0.5, 0.6, 0.55, 0.45, 0.41, 0.39]) == []


def test_a_rise_from_the_lowest() -> None:
    assert raised_by(alarms(metric="loss", rises_by=1.0), "loss", [4.0, 3.0, 2.0, 2.5, 3.0]) == [5]


def test_a_slow_fall_is_not_one_within_the_stretch() -> None:
    """0.1 in each five steps: 0.2 in ten, 0.4 in twenty."""
    values = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert raised_by(alarms(falls_by=0.3), "top1", values, every=5) == []
    assert raised_by(alarms(falls_by=0.3, over="20 steps"), "top1", values, every=5) == [16]


def test_a_movement_goes_off_once_and_again_after_it_was_undone() -> None:
    assert raised_by(alarms(falls_by=0.2), "top1", [0.5, 0.3, 0.2, 0.5, 0.49, 0.2]) == [2, 6]


def test_a_companion_has_to_move_too() -> None:
    """The gap shrinks while accuracy falls; either alone is silent."""
    watching = alarms(falls_by=0.1, along_with={"metric": "gap", "falls_by": 0.3})
    assert raised_by(watching, "top1", [0.5, 0.3]) == []
    (alarm,) = [alarm for gap in (0.9, 0.8, 0.55) for alarm in watching.observe(4, {"gap": gap})]
    assert alarm == Alarm(
        "alarm: top1 fell from 0.5 to 0.3 while gap fell from 0.9 to 0.55, within 10 steps", since=1, stops=False
    )
    assert raised_by(alarms(falls_by=0.1, along_with={"metric": "gap", "falls_by": 0.3}), "gap", [0.9, 0.1]) == []


def test_the_good_step_is_the_last_best_of_what_may_stop_the_run() -> None:
    watching = alarms(falls_by=0.3, action="stop")
    assert watching.good_steps() == []
    raised_by(watching, "top1", [0.4, 0.6, 0.6, 0.5])
    assert watching.good_steps() == [3]
    warning = alarms(falls_by=0.3)
    raised_by(warning, "top1", [0.4, 0.6])
    assert warning.good_steps() == []


def test_lines_of_an_earlier_life_count_and_are_not_told_again() -> None:
    watching = alarms(falls_by=0.2)
    watching.replay([{"step": 1, "top1": 0.6}, {"step": 2, "loss": 3.0}, {"step": 3, "top1": 0.3}])
    assert raised_by(watching, "top1", [0.3]) == []
    fresh = alarms(falls_by=0.2)
    fresh.replay([{"step": 1, "top1": 0.6}])
    assert [alarm.message for alarm in fresh.observe(4, {"top1": 0.35})] == [
        "alarm: top1 fell from 0.6 to 0.35, within 10 steps"
    ]


@pytest.mark.parametrize("fields", [{}, {"falls_by": 0.1, "rises_by": 0.1}])
def test_an_alarm_has_one_way(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="one of falls_by and rises_by"):
        AlarmConfig(metric="loss", over=Duration(1, "epochs"), **fields)


FIGURES = {"": ["loss", "lr"], "geometry": ["geometry/alignment"], "eval/a": ["eval/a/top1", "eval/a/top5"]}


@pytest.mark.parametrize("metric", ["loss", "geometry/alignment", "eval/a/top5"])
def test_an_alarm_on_what_a_run_measures_is_taken(metric: str) -> None:
    along = Movement(metric=metric, rises_by=1)
    require_known([AlarmConfig(metric=metric, over=Duration(1, "epochs"), falls_by=1, along_with=along)], FIGURES)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("los", "alarm.1: there is no figure 'los'; nearest: loss"),
        ("eval/a/top11", "alarm.1: there is no figure 'eval/a/top11'; nearest: eval/a/top1, eval/a/top5"),
        ("eval/b/top1", "alarm.1: nothing in this run measures eval/b/top1; nearest: eval/a"),
        ("data/source/a", "alarm.1: nothing in this run measures data/source/a; choose from: eval/a, geometry"),
    ],
)
def test_an_alarm_on_anything_else_is_named(metric: str, words: str) -> None:
    right = AlarmConfig(metric="loss", over=Duration(1, "epochs"), falls_by=1)
    wrong = right.model_copy(update={"along_with": Movement(metric=metric, rises_by=1)})
    with pytest.raises(EveryRankError) as caught:
        require_known([right, wrong], FIGURES)
    assert str(caught.value) == words
