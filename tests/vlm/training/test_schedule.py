"""The learning rate as a function of the step."""

import math

import pytest
from pydantic import TypeAdapter, ValidationError

from vlm.training.schedule import AnySchedule, ConstantSchedule, CosineSchedule, LearningRate, LinearSchedule, Schedule

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
    ],
)
def test_wrong_schedules_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _READER.validate_python(given)
