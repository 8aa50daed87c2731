"""Cleaning steps: what each takes away, and that a second time takes away nothing more."""

import html
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.samples.cleaning import CleaningStep, cleaned

STEPS: tuple[CleaningStep, ...] = ("whitespace", "html", "urls", "control", "unicode")
PIECES = [
    *(
        "<b>",
        "</b>",
        "<",
        ">",
        "<<a",
        "<!-- x -->",
        "<br/",
        "< b >",
        "&lt;",
        "&amp;lt;b&amp;gt;",
        "&",
        "amp;",
        "&#60;",
        "&gt",
    ),
    *(
        "http://",
        "https://a.b/c",
        "HTTP://x",
        "www.",
        "www.a.b",
        "\u00e9",
        "e\u0301",
        "\u200b",
        "\u200d",
        "\x00",
        "\ufeff",
    ),
    *("\ud83d", "\ude00", "\U0001f600", "\n", "\t", "\x85", "\xa0", " ", "b", ";"),
]


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ("whitespace", " a\tcat \n\n on\u3000a\xa0mat ", "a cat on a mat"),
        ("html", "<p class='x'>a <b>red</b>&nbsp;cat</p>", "a  red \xa0cat"),
        ("html", "Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("html", "&lt;i&gt;caf&eacute;&lt;/i&gt;", "café"),
        ("html", "I <3 cats, 2 < 3 > 1 and 5<6", "I <3 cats, 2 < 3 > 1 and 5<6"),
        ("html", "cut <a href=", "cut <a href="),
        ("urls", "cat https://cats.example/a?b=1 and www.cats.example", "cat   and"),
        ("urls", "awww. such a cat, http stands", "awww. such a cat, http stands"),
        ("control", "\ufeffa\u200b \x07cat\u202e\ud83d\n", "a cat"),
        ("control", "👩\u200d👧 \u0915\u094d\u200d\u0937", "👩\u200d👧 \u0915\u094d\u200d\u0937"),
        ("unicode", "cafe\u0301", "caf\u00e9"),
    ],
)
def test_what_a_step_takes_away(step: CleaningStep, text: str, expected: str) -> None:
    assert cleaned(text, (step,)) == expected


def test_steps_are_applied_in_their_order() -> None:
    text = "&#119;ww.cats.example cat"
    assert cleaned(text, ("html", "urls")) == "cat"
    assert cleaned(text, ("urls", "html")) == "www.cats.example cat"


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=8).map("".join)))
@pytest.mark.parametrize("step", STEPS)
def test_a_step_done_twice_is_done_once(step: CleaningStep, text: str) -> None:
    once = cleaned(text, (step,))
    assert cleaned(once, (step,)) == once


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_no_step_is_only_a_strip(text: str) -> None:
    assert cleaned(text, ()) == text.strip()


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_characters="<>&"), max_size=40))
def test_text_that_was_escaped_comes_back(text: str) -> None:
    assert cleaned(html.escape(text), ("html",)) == text.strip()


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_only_characters_that_show_nothing_go(text: str) -> None:
    gone = set(text) - set(cleaned(f"x{text}x", ("control",)))
    assert {unicodedata.category(character) for character in gone} <= {"Cc", "Cf", "Cs"}


def test_hostile_text_is_read_in_one_pass() -> None:
    many = 200_000  # a search from each "<" to the end of the text would take minutes
    assert cleaned("<a" * many, STEPS) == "<a" * many
    assert cleaned("<a>" * many, STEPS) == ""
    assert cleaned("<a" * many + ">b", STEPS) == "b"
    assert cleaned("www." * many, STEPS) == ""
    assert cleaned("&amp;" * many, STEPS) == "&" * many
