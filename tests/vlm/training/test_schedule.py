"""The learning rate as a function of the step."""

import math

import pytest

from vlm.training.schedule import ScheduleConfig, rate_factor


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    factors = [rate_factor(ScheduleConfig(), step, 4, 100) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_cosine_has_its_closed_form() -> None:
    config = ScheduleConfig(final=0.1)
    for step in (10, 40, 70, 99):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert rate_factor(config, step, 10, 100) == pytest.approx(expected, abs=1e-12)


def test_constant_stays_at_the_peak() -> None:
    assert rate_factor(ScheduleConfig(kind="constant"), 77, 10, 100) == 1.0
