"""The one number that captions name."""

import pytest

from data.counting.named import NamedNumber, Outcome, named_number


@pytest.mark.parametrize(
    ("captions", "named"),
    [
        (["Three dogs"], NamedNumber(3, (0,))),
        (["dogs", "TEN dogs", "ten of them", "four dogs, two cats"], NamedNumber(10, (1, 2))),
        (["a dog", "2 dogs", "one dog", "a network"], Outcome.NO_NUMBER),
        ([], Outcome.NO_NUMBER),
        (["a dog", "two dogs and two cats"], Outcome.SEVERAL_NUMBERS),
        (["two dogs", "a dog", "three dogs"], Outcome.CAPTIONS_DISAGREE),
    ],
)
def test_only_captions_with_one_number_speak_and_have_to_agree(
    captions: list[str], named: NamedNumber | Outcome
) -> None:
    assert named_number(captions) == named
