"""Class numbers are what 64-bit integers hold, however they are written."""

import pytest

from data.samples.bad_sample import BadSampleError
from data.samples.labels import class_number


@pytest.mark.parametrize(
    ("stored", "number"),
    [
        (b"7", 7),
        (b" 7\n", 7),
        (b"\xef\xbb\xbf7", 7),
        (b"0", 0),
        (b"000", 0),
        (b"0" * 5_000 + b"12", 12),
        (b"9223372036854775807", 2**63 - 1),
        ("12", 12),
        (3, 3),
        (3.0, 3),
    ],
)
def test_whole_numbers_are_read(stored: object, number: int) -> None:
    assert class_number(stored) == number


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b" ",
        b"-1",
        b"1.5",
        b"cat",
        b"1 2",
        b"\xb2",
        "\u0663",
        b"9" * 5_000,
        b"9223372036854775808",
        2**63,
        1.5,
        None,
        True,
    ],
)
def test_anything_else_is_a_bad_sample_named_in_short(stored: object) -> None:
    with pytest.raises(BadSampleError, match="its label is no class number but ") as caught:
        class_number(stored)
    assert len(str(caught.value)) < 80
