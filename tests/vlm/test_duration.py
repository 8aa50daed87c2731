"""Durations with units."""

import pytest

from vlm.duration import Duration


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("40 epochs", 40 * 10),  # 1,000 samples in batches of 100
        ("1 epoch", 10),
        ("2000 steps", 2000),
        ("1.2M samples", 12_000),
        ("1.2k samples", 12),
        ("250 samples", 3),
        ("0.5 epochs", 5),
        ("0 steps", 0),
        ("12_000 steps", 12_000),
    ],
)
def test_a_duration_is_so_many_steps(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(global_batch=100, samples_per_epoch=1000) == steps


def test_a_part_of_an_epoch_rounds_up_to_whole_steps() -> None:
    assert Duration.parse("1 epoch").steps(global_batch=300, samples_per_epoch=1000) == 4


@pytest.mark.parametrize("text", ["40", "epochs", "-3 steps", "4 fortnights", "", "4 4 steps"])
def test_what_has_no_number_or_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a number and a unit"):
        Duration.parse(text)


@pytest.mark.parametrize("text", ["40 epochs", "1200000 samples", "1.5 epochs"])
def test_a_duration_is_written_as_it_is_read(text: str) -> None:
    assert str(Duration.parse(text)) == text
    assert Duration.parse(str(Duration.parse(text))) == Duration.parse(text)
