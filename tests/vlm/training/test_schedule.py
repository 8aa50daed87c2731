"""The learning rate as a function of the step."""

import math
from collections.abc import Callable, Mapping

import pytest
from pydantic import TypeAdapter, ValidationError

from vlm.errors import EveryRankError
from vlm.training.schedule import (
    AnySchedule,
    ConstantSchedule,
    CosineSchedule,
    LearningRate,
    LinearSchedule,
    Schedule,
)

_READER: TypeAdapter[Schedule] = TypeAdapter(AnySchedule)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    rate = LearningRate(CosineSchedule(), 2.0, warmup_steps=4, num_steps=100)
    assert [rate(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_the_cosine_has_its_closed_form() -> None:
    rate = LearningRate(CosineSchedule(final=0.1), 3.0, warmup_steps=10, num_steps=100)
    for step in (10, 40, 70, 99):
        expected = 3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2)
        assert rate(step) == pytest.approx(expected, abs=1e-12)


def test_the_line_goes_from_the_peak_to_its_end() -> None:
    rate = LearningRate(LinearSchedule(kind="linear", final=0.2), 5.0, warmup_steps=10, num_steps=110)
    assert [rate(step) for step in (10, 60, 110)] == pytest.approx([5.0, 3.0, 1.0], abs=1e-12)


def test_constant_stays_at_the_peak() -> None:
    rate = LearningRate(ConstantSchedule(kind="constant"), 0.5, warmup_steps=10, num_steps=100)
    assert {rate(step) for step in (10, 77, 99)} == {0.5}


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak() -> None:
    rate = LearningRate(CosineSchedule(), 1.0, warmup_steps=10, num_steps=10)
    assert (rate(9), rate(10)) == (1.0, 1.0)


def test_a_schedule_without_a_kind_is_the_cosine() -> None:
    assert _READER.validate_python({"final": 0.5}) == CosineSchedule(final=0.5)


def test_what_version_0_1_0_wrote_of_a_constant_rate_is_read() -> None:
    assert _READER.validate_python({"kind": "constant", "final": 0.0}) == ConstantSchedule(kind="constant")
    with pytest.raises(ValidationError, match="unknown key"):
        _READER.validate_python({"kind": "constant", "final": 0.1})


def of_run(given: Mapping[str, object], num_steps: int) -> LearningRate:
    """The rate of a run with steps of 8, an epoch of 100 samples, and a peak of 2."""
    schedule = _READER.validate_python(given)
    return LearningRate.of_run(schedule, 2.0, global_batch=8, num_samples=100, num_steps=num_steps)


@pytest.mark.parametrize(
    ("last", "steps"), [("20 steps", 20), ("160 samples", 20), ("1.6 epochs", 20), ("20%", 20), ("19.1 %", 20)]
)
@pytest.mark.parametrize(("shape", "left"), [("linear", lambda t: 1 - t), ("1-sqrt", lambda t: 1 - t**0.5)])
def test_the_last_stretch_goes_to_zero_from_the_stable_rate(
    last: str, steps: int, shape: str, left: Callable[[float], float]
) -> None:
    """WSD: n steps of warm-up, the peak, then 1 - t or 1 - sqrt(t), of which t is done."""
    rate = of_run({"kind": "constant", "warmup": "10 steps", "cooldown": {"last": last, "shape": shape}}, 100)
    expected = [2 * (step + 1) / 10 for step in range(10)] + [2.0] * 70 + [2 * left(k / steps) for k in range(steps)]
    assert [rate(step) for step in range(100)] == pytest.approx(expected, abs=1e-12)
    assert rate(100) == rate(101) == 0.0


def test_a_cool_down_begins_where_the_cosine_has_come_to_its_end() -> None:
    rate = of_run({"final": 0.25, "warmup": "10 steps", "cooldown": {"last": "40 steps"}}, 100)
    assert rate(35) == pytest.approx(2 * (0.25 + 0.75 * 0.5), abs=1e-12)  # half of the 50 steps between
    assert [rate(60), rate(70), rate(80)] == pytest.approx([0.5, 0.375, 0.25], abs=1e-12)


def test_a_run_with_a_stable_rate_is_made_longer_without_a_change_of_what_was_done() -> None:
    schedule = {"kind": "constant", "warmup": "10 steps", "cooldown": {"last": "20 steps", "shape": "1-sqrt"}}
    short, long = of_run(schedule, 100), of_run(schedule, 250)
    assert [short(step) for step in range(80)] == [long(step) for step in range(80)]
    assert [short(80 + step) for step in range(20)] == [long(230 + step) for step in range(20)]


@pytest.mark.parametrize("last", ["91 steps", "91%", "730 samples"])
def test_a_cool_down_that_does_not_fit_behind_the_warm_up_is_refused(last: str) -> None:
    schedule = {"kind": "constant", "warmup": "10 steps", "cooldown": {"last": last}}
    with pytest.raises(EveryRankError, match=r"cooldown.last: found .*, which is \d+ steps; behind 10 of warm"):
        of_run(schedule, 100)


def test_what_is_written_of_a_cool_down_is_read_again() -> None:
    for last in ("20%", "12.5%", "2000 steps"):
        schedule = _READER.validate_python({"kind": "constant", "cooldown": {"last": last}})
        written = _READER.dump_python(schedule, mode="json")
        assert written["cooldown"] == {"last": last, "shape": "linear"}
        assert _READER.validate_python(written) == schedule


class Halving(Schedule):
    """A schedule of one's own: a constant that is not the peak."""

    share: float = 0.5

    def factor(self, progress: float) -> float:
        return self.share


def test_a_schedule_of_ones_own_is_named_by_its_class() -> None:
    kind = f"{__name__}:Halving"
    schedule = _READER.validate_python({"kind": kind, "share": 0.25, "warmup": "2 steps"})
    assert schedule == Halving(kind=kind, share=0.25, warmup=schedule.warmup)
    assert LearningRate(schedule, 4.0, 2, 10)(5) == 1.0
    assert _READER.validate_python(_READER.dump_python(schedule, mode="json")) == schedule


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "cosin"}, "there is no schedule 'cosin'; nearest: cosine"),
        ({"kind": f"{__name__}:LearningRate"}, "is not a subclass of vlm.training.schedule.Schedule"),
        ({"kind": 3}, "valid string"),
        ({"final": 2}, "less than or equal to 1"),
        ({"finall": 0.2}, "unknown key"),
        ({"cooldown": {"last": "20%"}}, "begins where cosine has come to, which is 0; say final"),
        ({"kind": "constant", "cooldown": {"last": "0%"}}, "must be more than 0% and at most 100%, found 0%"),
        ({"kind": "constant", "cooldown": {"last": "101%"}}, "must be more than 0% and at most 100%, found 101%"),
        ({"kind": "constant", "cooldown": {"last": "0 steps"}}, "must be longer than zero"),
        ({"kind": "constant", "cooldown": {"last": "20"}}, 'or percent of the run: "20%"'),
        ({"kind": "constant", "cooldown": {"last": 20}}, "names its unit"),
        ({"kind": "constant", "cooldown": {"last": "20%", "shape": "sqrt"}}, "'linear' or '1-sqrt'"),
    ],
)
def test_wrong_schedules_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _READER.validate_python(given)
