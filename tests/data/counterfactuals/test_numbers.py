"""Spelled numbers in captions: which are found, and that nothing else changes where one is replaced."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.counterfactuals.numbers import NUMBERS, WORDS, number_words, only_number, with_every, with_number

TEXT = st.text(st.sampled_from("abtwoenigh 12,.-'\n"), max_size=20)


@pytest.mark.parametrize(
    ("caption", "values"),
    [
        ("Three dogs run", [3]),
        ("a dog and TWO cats, ten birds", [2, 10]),
        ("one dog and 3 cats", []),
        ("the network weighs often", []),
        ("player number five of Number Six", []),
        ("player no. five", []),
        ("number five and two dogs", [2]),
        ("twenty-two dogs, a two-time winner, two-storey houses", []),
        ("two hundred people, ten thousand birds, two dozen eggs", []),
        ("the two's company of two\u2019s", []),
        ("'two' dogs (three), four.", [2, 3, 4]),
        ("two\nthree", [2, 3]),
        ("", []),
    ],
)
def test_the_numbers_that_count_are_found(caption: str, values: list[int]) -> None:
    assert [word.value for word in number_words(caption)] == values
    only = only_number(caption)
    assert (only.value if only else None) == (values[0] if len(values) == 1 else None)


@pytest.mark.parametrize(("caption", "other"), [("Two dogs", "Six dogs"), ("TWO dogs", "SIX dogs"), ("two", "six")])
def test_the_case_is_kept(caption: str, other: str) -> None:
    word = only_number(caption)
    assert word is not None
    assert with_number(caption, word, 6) == other


@given(TEXT, st.sampled_from(sorted(NUMBERS)), TEXT, st.sampled_from(sorted(WORDS)))
def test_only_the_number_changes_and_it_comes_back(before: str, word: str, behind: str, value: int) -> None:
    caption = f"{before} {word} {behind}"
    for found in number_words(caption):
        changed = with_number(caption, found, value)
        assert changed[: found.start] == caption[: found.start]
        assert changed[found.start :].removeprefix(WORDS[value]) == caption[found.stop :]
        again = next(one for one in number_words(changed) if one.start == found.start)
        assert with_number(changed, again, found.value) == caption


def test_every_occurrence_of_the_labels_own_word_is_replaced_and_no_other() -> None:
    caption = "Eight colorful starfish - eight, eighth, seven"
    assert with_every(caption, 8, 3) == "Three colorful starfish - three, eighth, seven"
    assert with_every("a two-car garage for two", 2, 9) == "a nine-car garage for nine"
    assert with_every("no number here", 2, 9) == "no number here"


def test_every_caption_of_countbench_has_its_number() -> None:
    folder = os.environ.get("VLM_TEST_DATA")
    if folder is None:
        pytest.skip("VLM_TEST_DATA is not set: it names the folder of countbench.json")
    captions = json.loads((Path(folder) / "countbench.json").read_text())
    for one in captions:
        changed = with_every(one["text"], one["number"], 2 if one["number"] == 10 else one["number"] + 1)
        assert changed != one["text"]
