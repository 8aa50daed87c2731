"""Captions as shards store them, and the policies by which a step reads them."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from data.randomness import Draws
from data.samples.bad_sample import BadSampleError
from data.samples.captions import (
    DROPPED,
    MOST_CHARACTERS,
    CaptionConfig,
    CaptionPolicy,
    ChosenCaptions,
    captions_by_field,
    choose,
    read_captions,
    read_fields,
)
from vlm.config import Config, first_problem

VISITS = 2000
USUAL = CaptionConfig()
SAMPLE: dict[str, tuple[str, ...]] = {"captions": ("a", "b", "c", "d", "e")}
TWO_FIELDS = {"alt": ("x",), "synthetic": ("y", "z")}


class Recipe(Config):
    caption: CaptionConfig = USUAL


def config(**given: Any) -> CaptionConfig:
    return CaptionConfig.model_validate(given)


def visits(captions: dict[str, tuple[str, ...]], how: CaptionConfig) -> list[ChosenCaptions]:
    return [choose(captions, how, Draws("caption", 7, number)) for number in range(VISITS)]


def assert_share(found: int, share: float) -> None:
    """Within five standard deviations of a binomial count."""
    assert abs(found - VISITS * share) < 5 * (VISITS * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    ("text", "fields", "captions"),
    [
        (b" a cat\n", {}, {"txt": ("a cat",)}),
        ("ein Kätzchen".encode(), {}, {"txt": ("ein Kätzchen",)}),
        (None, {"captions": ["  one ", "", "two", " \n"]}, {"captions": ("one", "two")}),
        (None, {"captions": "only one"}, {"captions": ("only one",)}),
        (None, {"caption": "single"}, {"caption": ("single",)}),
        (b"from txt", {"caption": "from json"}, {"txt": ("from txt",)}),
        (b"from txt", {"captions": ["from json"]}, {"captions": ("from json",)}),
        (b"from txt", {"captions": [], "caption": "from json"}, {"txt": ("from txt",)}),
        (b" ", {"captions": [" "], "caption": "from json"}, {"caption": ("from json",)}),
        (b"  \n", {}, {}),
        (None, {}, {}),
        (None, {"caption": None}, {}),
        (None, {"captions": ["a", None, float("nan"), "b"]}, {"captions": ("a", "b")}),
        (None, {"captions": [None], "caption": "c"}, {"caption": ("c",)}),
        ("\ufeffa cat".encode(), {}, {"txt": ("a cat",)}),
        (None, {"caption": "half \ud83d of a pair"}, {"caption": ("half \ufffd of a pair",)}),
        (None, {"caption": "\ud83d\ude00 a pair"}, {"caption": ("\N{GRINNING FACE} a pair",)}),
    ],
)
def test_captions_at_the_usual_place_are_stripped_and_empty_ones_are_none(
    text: bytes | None, fields: dict[str, object], captions: dict[str, tuple[str, ...]]
) -> None:
    assert captions_by_field(text, fields, USUAL) == captions
    assert read_captions(text, fields) == tuple(caption for part in captions.values() for caption in part)


def test_named_fields_are_all_read_and_nothing_else_is() -> None:
    fields = {"alt_text": "alt", "synthetic": ["s", "t"], "empty": "", "captions": 7}
    how = config(fields={"synthetic": 1, "txt": 1, "empty": 1, "missing": 1, "alt_text": 1})
    assert captions_by_field(b"text", fields, how) == {"synthetic": ("s", "t"), "txt": ("text",), "alt_text": ("alt",)}
    assert captions_by_field(b"caf\xe9", fields, config(fields={"alt_text": 1})) == {"alt_text": ("alt",)}
    assert how.places == ("synthetic", "txt", "empty", "missing", "alt_text")
    assert USUAL.places == ("captions", "txt", "caption")


def test_a_caption_that_cleaning_empties_is_missing() -> None:
    how = config(clean=("html", "urls", "whitespace"))
    fields = {"captions": ["<img src='x'>", "http://x.example/y.jpg", " two <b>red</b>  cats"]}
    assert captions_by_field(None, fields, how) == {"captions": ("two red cats",)}
    with pytest.raises(BadSampleError, match="no caption, or only empty ones"):
        choose(captions_by_field(b"<br>", {}, how), how, Draws(0))


def test_what_is_no_text_is_a_bad_sample_with_a_reason() -> None:
    with pytest.raises(BadSampleError, match=r"not UTF-8 \(byte 3\)"):
        captions_by_field(b"caf\xe9", {}, USUAL)
    with pytest.raises(BadSampleError, match="no text but 7"):
        captions_by_field(None, {"captions": ["fine", 7]}, USUAL)
    with pytest.raises(BadSampleError, match=r"no text but \{'en': 'a'\}"):
        captions_by_field(None, {"alt": {"en": "a"}}, config(fields={"alt": 1}))
    for broken in (b'{"captions": [', b'{"captions": "\xff"}', b"", b"[" * 100_000):
        with pytest.raises(BadSampleError, match="json cannot be read"):
            read_fields(broken)
    with pytest.raises(BadSampleError, match="no object but a list"):
        read_fields(b"[1]")
    assert read_fields(None) == {}


def test_a_txt_member_is_one_caption_or_one_a_line() -> None:
    text = b"\xef\xbb\xbfa cat\r\n\n two\xe2\x80\xa8cats \n"
    assert captions_by_field(text, {}, USUAL) == {"txt": ("a cat\r\n\n two\u2028cats",)}
    assert captions_by_field(text, {}, config(txt="lines")) == {"txt": ("a cat", "two\u2028cats")}
    assert captions_by_field(text, {"captions": ["b\nc"]}, config(txt="lines")) == {"captions": ("b\nc",)}


@pytest.mark.parametrize("fill", ["a", "é", "木", "\N{GRINNING FACE}"])  # 1 to 4 bytes
def test_of_a_huge_caption_the_beginning_is_read(fill: str) -> None:
    huge = f"start{fill * 3_000_000}"
    expected = huge[:MOST_CHARACTERS]
    assert captions_by_field(huge.encode(), {}, USUAL) == {"txt": (expected,)}
    assert captions_by_field(None, {"captions": [huge, "b"]}, USUAL) == {"captions": (expected, "b")}


def test_a_visit_takes_no_more_than_a_few_huge_captions() -> None:
    huge = {"captions": tuple(f"{number:05d}" * (MOST_CHARACTERS // 5) for number in range(500))}
    for policy, most in (("all", 10), ("concat", 1), ("first", 1)):
        chosen = choose(huge, config(policy=policy), Draws(0))
        assert sum(map(len, chosen.all)) + len(chosen.text) <= (most + 1) * MOST_CHARACTERS
        assert chosen.text
        assert not chosen.all or chosen.all[0] == chosen.text


@pytest.mark.parametrize("policy", ["first", "random", "all", "concat"])
def test_no_caption_is_a_bad_sample_under_every_policy(policy: CaptionPolicy) -> None:
    for dropout in (0.0, 0.99):
        with pytest.raises(BadSampleError, match="it has no caption, or only empty ones"):
            choose({}, config(policy=policy, dropout=dropout), Draws(0))


def test_first_takes_the_first_and_random_takes_each_alike() -> None:
    assert set(visits(SAMPLE, config(policy="first"))) == {("a", "captions", ())}
    chosen = Counter(visit.text for visit in visits(SAMPLE, config(policy="random")))
    assert set(chosen) == set(SAMPLE["captions"])
    for count in chosen.values():
        assert_share(count, 1 / 5)


def test_concat_joins_in_order_as_sentences() -> None:
    captions: dict[str, tuple[str, ...]] = {"captions": ("a cat", "It sleeps.", "why?", "on a mat")}
    assert choose(captions, config(policy="concat"), Draws(0)) == ("a cat. It sleeps. why? on a mat", "captions", ())
    how = config(policy="concat", fields={"alt": 1, "synthetic": 1})
    assert {visit[:2] for visit in visits(TWO_FIELDS, how)} == {("x", "alt"), ("y. z", "synthetic")}


def test_all_gives_every_caption_of_every_field_the_trained_one_first() -> None:
    how = config(policy="all", fields={"alt": 1, "synthetic": 3})
    seen = visits({**TWO_FIELDS, "alt": ("x", "y")}, how)
    assert {visit.text for visit in seen} == {"x", "y", "z"}
    for visit in seen:
        assert visit.all[0] == visit.text
        assert sorted(visit.all) == ["x", "y", "z"]


@pytest.mark.parametrize("policy", ["first", "random", "all", "concat"])
def test_fields_are_drawn_by_weight_among_those_that_a_sample_has(policy: CaptionPolicy) -> None:
    how = config(policy=policy, fields={"missing": 5.0, "alt": 0.6, "synthetic": 0.2})
    count = Counter(visit.field for visit in visits(TWO_FIELDS, how))
    assert set(count) == {"alt", "synthetic"}
    assert_share(count["alt"], 0.75)


def test_a_key_has_one_choice() -> None:
    how = config(policy="all", fields={"alt": 1, "synthetic": 1}, dropout=0.2)
    assert visits(TWO_FIELDS, how) == visits(TWO_FIELDS, how)
    again = [choose(TWO_FIELDS, how, Draws("caption", 8, number)) for number in range(VISITS)]
    assert again != visits(TWO_FIELDS, how)


@pytest.mark.parametrize("policy", ["first", "random", "all", "concat"])
def test_dropout_empties_its_share_and_leaves_the_other_choices_alone(policy: CaptionPolicy) -> None:
    fields = {"alt": 1.0, "synthetic": 1.0}
    before = visits(TWO_FIELDS, config(policy=policy, fields=fields))
    after = visits(TWO_FIELDS, config(policy=policy, fields=fields, dropout=0.3))
    dropped = [number for number, visit in enumerate(after) if visit.field == DROPPED]
    assert_share(len(dropped), 0.3)
    assert {after[number] for number in dropped} == {("", DROPPED, ("",) if policy == "all" else ())}
    assert all(old == new for old, new in zip(before, after, strict=True) if new.field != DROPPED)
    # Which visits are dropped says nothing of what they would have read.
    dropped_fields = Counter(before[number].field for number in dropped)
    assert abs(dropped_fields["alt"] - len(dropped) / 2) < 5 * (len(dropped) / 4) ** 0.5


def test_more_dropout_drops_the_same_visits_and_more() -> None:
    few, many = (
        {number for number, visit in enumerate(visits(SAMPLE, config(dropout=share))) if visit.field == DROPPED}
        for share in (0.1, 0.4)
    )
    assert few < many


def test_the_field_drawn_does_not_depend_on_the_policy() -> None:
    fields = {"alt": 1.0, "synthetic": 2.0}
    drawn = [
        [visit.field for visit in visits(TWO_FIELDS, config(policy=policy, fields=fields))]
        for policy in ("first", "random", "all", "concat")
    ]
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), st.integers(0, 1000))
def test_any_positive_weights_draw_a_field(weights: list[float], key: int) -> None:
    fields = {f"f{number}": weight for number, weight in enumerate(weights)}
    assert choose(dict.fromkeys(fields, ("x",)), config(fields=fields), Draws(key)).field in fields


def test_a_policy_alone_stands_for_a_whole_configuration() -> None:
    short = Recipe.model_validate({"caption": "first"})
    assert short == Recipe.model_validate({"caption": {"policy": "first"}})
    assert Recipe.model_validate_json(short.model_dump_json()) == short
    assert Recipe().caption == config(policy="random")


def test_the_schema_allows_both_forms() -> None:
    short, mapping = TypeAdapter(CaptionConfig).json_schema()["anyOf"]
    assert short == {"type": "string", "enum": ["first", "random", "all", "concat"]}
    assert set(mapping["properties"]) == {"policy", "fields", "dropout", "txt", "clean"}
    assert json.dumps(Recipe.model_json_schema())


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        ("frist", "caption.policy: found 'frist'; input should be 'first', 'random', 'all' or 'concat'"),
        ({"fields": {"alt": 0}}, "caption.fields.alt: found 0; input should be greater than "),
        ({"fields": {"alt": -1.5}}, "caption.fields.alt: found -1.5; input should be greater than "),
        ({"fields": {"alt": float("inf")}}, "caption.fields.alt: found inf; input should be a finite number"),
        ({"fields": {}}, "caption.fields: found {}; "),
        ({"dropout": 1.0}, "caption.dropout: found 1.0; input should be less than 1"),
        ({"dropout": -0.1}, "caption.dropout: found -0.1; "),
        ({"clean": ["htm"]}, "caption.clean.0: found 'htm'; input should be 'whitespace', 'html', "),
        ({"feilds": {"alt": 1}}, "caption.feilds: unknown key (value {'alt': 1}); nearest: fields"),
        (7, "caption: found 7; "),
    ],
)
def test_a_mistake_is_one_line(caption: object, problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"caption": caption})
    line = first_problem(caught.value, Recipe)
    assert line.startswith(problem)
    assert "\n" not in line
