"""Editors: what they apply to, that they change what they say they change, and that no edit is a true caption."""

import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data.counterfactuals.config import CounterfactualsConfig
from data.counterfactuals.counterfactual import Edited, counterfactuals
from data.counterfactuals.editor import CaptionInSample, Editor
from data.counterfactuals.lexicon import ATTRIBUTE_WORDS, COLOUR_WORDS, NOUN_WORDS, plural, singular
from data.counterfactuals.numbers import NUMBERS, WORDS, number_words
from data.counterfactuals.truth import is_true
from data.randomness import Draws
from data.samples.bad_sample import BadSampleError

ALL = {
    "number": {},
    "colour": {},
    "attribute": {},
    "noun": {},
    "swap": {},
    "swapped": {"kind": "swap", "of": "attributes"},
    "word_order": {},
    "negation": {},
}
WILD = ("bear", "zebra", "giraffe", "lion", "tiger", "monkey", "deer", "wolf", "camel", "kangaroo")


class Shout(Editor):
    """An editor of one's own."""

    def applies(self, caption: CaptionInSample) -> bool:
        return not caption.text.isupper()

    def edit(self, caption: CaptionInSample, draws: Draws) -> str:
        return f"{caption.text.upper()} {draws.integer(10)}"


def config(editors: Any, **fields: Any) -> CounterfactualsConfig:
    return CounterfactualsConfig.model_validate({"editors": editors, **fields})


def edits(
    text: str, editors: dict[str, Any], captions: tuple[str, ...] = (), visits: int = 300, **json: Any
) -> set[str]:
    """All that is drawn for a caption in so many visits."""
    caption = CaptionInSample(text, captions, json)
    made = [counterfactuals(caption, config(editors), (0, epoch, 7)) for epoch in range(visits)]
    return {one.text for each in made for one in each.made}


@pytest.mark.parametrize(
    ("editors", "text", "expected"),
    [
        ({"number": {}}, "Two dogs", {f"{word.capitalize()} dogs" for word in NUMBERS if word != "two"}),
        ({"number": {"by_distance": [1.0]}}, "five dogs", {"four dogs", "six dogs"}),
        ({"number": {"by_distance": [0.0, 0.0, 1.0]}}, "TWO dogs", {"FIVE dogs"}),
        ({"number": {}}, "a dog of number five", set()),
        ({"number": {}}, "two dogs and three cats", set()),
        ({"noun": {"groups": ["adult"]}}, "A man and two men", {"A woman and two men", "A man and two women"}),
        ({"noun": {"groups": ["pet"]}}, "a dog", {"a cat", "a rabbit", "a hamster"}),
        ({"noun": {"groups": ["wild animal"]}}, "A fox.", {f"A {word}." for word in WILD} | {"An elephant."}),
        ({"noun": {"groups": ["child"]}}, "the boys' ball", {"the girls' ball"}),
        ({"noun": {}}, "something else", set()),
        ({"attribute": {"groups": ["size"]}}, "a tiny, large thing", {"a large, large thing", "a tiny, small thing"}),
        ({"swap": {}}, "a dog chases a cat", {"a cat chases a dog"}),
        ({"swap": {}}, "An elephant chases two dogs near a car", {"A car chases two dogs near an elephant"}),
        ({"swap": {}}, "a dog and a cat", set()),
        ({"swap": {}}, "a big dog and a cat", {"a big cat and a dog"}),
        ({"swap": {"of": "attributes"}}, "a red ball on a blue box", {"a blue ball on a red box"}),
        ({"swap": {"of": "attributes"}}, "a red, white and blue flag", set()),
        ({"swap": {"of": "attributes"}}, "a red ball on a small box", set()),
        ({"word_order": {"unit": "within_trigrams"}}, "a b a d", {"a a b d", "b a a d"}),
        ({"word_order": {"unit": "trigrams"}}, "a b c d", {"d a b c"}),
        ({"word_order": {}}, "a dog runs", set()),
        ({"negation": {}}, "A dog is red", {"A dog is not red"}),
        ({"negation": {}}, "A dog is not red", {"A dog is red"}),
        ({"negation": {}}, "Dogs without hats", {"Dogs with hats"}),
        ({"negation": {}}, "dogs running with a cat and a ball in the evening", {
            "dogs not running with a cat and a ball in the evening",
            "dogs running without a cat and a ball in the evening",
            "dogs running with a cat but no ball in the evening",
        }),
    ],
)  # fmt: skip
def test_what_an_editor_makes_of_a_caption(editors: dict[str, Any], text: str, expected: set[str]) -> None:
    assert edits(text, editors) == expected


def test_another_colour_in_its_place_and_none_that_is_nearly_the_same() -> None:
    made = edits("a Navy hat", {"colour": {}})
    assert made == {
        f"a {word.capitalize()} hat".replace("a Orange", "an Orange")
        for word in COLOUR_WORDS.things["colour"].singular
        if word != "blue"
    }


@settings(max_examples=60)
@given(st.sampled_from(sorted(NUMBERS)), st.text(max_size=30), st.text(max_size=30), st.integers(0, 10**6))
def test_only_the_number_changes(word: str, before: str, behind: str, sample: int) -> None:
    text = f"{before} {word} {behind}"
    made = counterfactuals(CaptionInSample(text), config({"number": {}}), (0, 0, sample)).made
    found = number_words(text)
    assert bool(made) == (len(found) == 1)
    for one in made:
        (place,) = found
        assert one.text.startswith(text[: place.start])
        assert one.text.endswith(text[place.stop :])
        other = one.text[place.start : len(one.text) - len(text[place.stop :])]
        assert NUMBERS[other.lower()] != place.value


def test_numbers_are_drawn_uniformly_or_by_their_distance() -> None:
    def counts(**options: Any) -> Counter[int]:
        caption = CaptionInSample("seven stars")
        made = (counterfactuals(caption, config({"number": options}), (3, 0, n)).made[0].text for n in range(2000))
        return Counter(NUMBERS[text.split()[0]] for text in made)

    uniform = counts()
    assert {value: uniform[value] / 2000 for value in WORDS if value != 7} == pytest.approx(
        dict.fromkeys({*WORDS} - {7}, 1 / 8), abs=0.035
    )
    near = counts(by_distance=[3.0, 1.0])
    assert {value: near[value] / 2000 for value in sorted(near)} == pytest.approx(
        {5: 1 / 8, 6: 3 / 8, 8: 3 / 8, 9: 1 / 8}, abs=0.03
    )


def test_a_visit_is_keyed_by_seed_epoch_and_sample_and_one_editor_does_not_change_another() -> None:
    caption = CaptionInSample("two red dogs run in the big park")

    def made(key: tuple[int, int, int], *names: str, **fields: Any) -> dict[str, str]:
        editors = {name: ALL[name] for name in names}
        return {one.editor: one.text for one in counterfactuals(caption, config(editors, **fields), key).made}

    first = made((0, 0, 5), *ALL, per_caption="each")
    assert sorted(first) == ["attribute", "colour", "noun", "number", "word_order"]
    assert first == made((0, 0, 5), *reversed(ALL), per_caption="each")
    assert first["colour"] == made((0, 0, 5), "colour")["colour"]
    for key in ((1, 0, 5), (0, 1, 5), (0, 0, 6)):
        assert made(key, *ALL, per_caption="each") != first
    one = [made((0, epoch, 5), "number", "colour") for epoch in range(400)]
    assert all(len(each) == 1 for each in one)
    assert sum("number" in each for each in one) == pytest.approx(200, abs=40)
    weighted = config({"number": {"weight": 3.0}, "colour": {}})
    shares = Counter(counterfactuals(caption, weighted, (0, epoch, 5)).made[0].editor for epoch in range(1000))
    assert shares["number"] == pytest.approx(750, abs=50)


def test_an_editor_whose_edits_are_all_true_gives_way_to_another() -> None:
    caption = CaptionInSample("a man in red", ("a man in red", "a woman in red"))
    only = counterfactuals(caption, config({"noun": {"groups": ["adult"]}}), (0, 0, 1))
    assert only == Edited((), ("noun",))
    both = counterfactuals(caption, config({"noun": {"groups": ["adult"], "weight": 1e6}, "colour": {}}), (0, 0, 1))
    assert both.failed == ("noun",)
    assert [one.editor for one in both.made] == ["colour"]


@pytest.mark.parametrize(
    ("edited", "caption", "fields", "true"),
    [
        ("A  dog!", "a cat", {}, True),  # it is among the captions
        ("a dog.", "a cat", {}, True),
        ("a horse", "a cat", {}, False),
        ("a horse", "a cat", {"objects": ["Horse"]}, True),
        ("two horses", "two cats", {"counts": {"horse": 1}}, False),
        ("two horses", "two cats", {"counts": {"horse": 2}}, True),
        ("two small brown horses", "two small brown cats", {"counts": {"horse": 2}}, True),
        ("a horse", "a cat", {"counts": {"horse": 2}}, True),
        ("a horse", "a cat", {"counts": {"horse": 0}}, False),
        ("three red circles", "two red circles", {"counts": {"red circle": 2, "blue circle": 3}}, False),
        ("three blue circles", "three red circles", {"counts": {"red circle": 3, "blue circle": 3}}, True),
        ("four blue circles", "four red circles", {"counts": {"red circle": 4, "blue circle": 3}}, False),
        ("three crosses", "two crosses", {"counts": {"cross": 3}}, True),
        ("five people", "two people", {"counts": {"person": 5}}, True),
        ("a cat chases a dog", "a dog chases a cat", {"objects": ["dog", "cat"]}, False),
        ("a horse", "a cat", {"counts": "many", "objects": {"horse": 1}}, False),
        ("a horse", "a cat", {"counts": {"horse": True}, "objects": [3, ""]}, False),
    ],
)
def test_an_edit_is_true_where_the_sample_says_so(
    edited: str, caption: str, fields: dict[str, Any], true: bool
) -> None:
    assert is_true(edited, CaptionInSample(caption, (caption, "a dog"), fields)) is true


def test_wrong_captions_of_the_data_are_drawn_but_for_those_that_are_right() -> None:
    stored = ["a cat", "A dog. ", "a bird", "", None]
    assert edits("a dog", {"stored": {}}, negatives=stored) == {"a cat", "a bird"}
    assert edits("a dog", {"stored": {"field": "wrong"}}, wrong="a cat", negatives=stored) == {"a cat"}
    assert edits("a dog", {"stored": {}}) == set()
    caption = CaptionInSample("a dog", ("a dog",), {"negatives": ["a dog", "A dog!"]})
    assert counterfactuals(caption, config({"stored": {}}), (0, 0, 1)) == Edited((), ("stored",))
    with pytest.raises(BadSampleError, match="a caption is no text but 3"):
        edits("a dog", {"stored": {}}, negatives=[3])


def test_an_editor_of_ones_own_is_named_by_module_and_class() -> None:
    name = "tests.data.counterfactuals.test_editors:Shout"
    own = CounterfactualsConfig.model_validate(name)
    (made,) = counterfactuals(CaptionInSample("a dog"), own, (0, 0, 1)).made
    assert made.text.startswith("A DOG ")
    assert made.editor == name
    assert CounterfactualsConfig.model_validate(own.model_dump(mode="json")) == own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nummber", "no editor 'nummber'; nearest: number"),
        ([], "editors"),
        ({"editors": {}}, "editors"),
        ({"editors": {"noun": {"groups": ["pets"]}}}, "groups: found 'pets'; nearest: pet"),
        ({"editors": {"number": {"by_distance": [0.0, 0, 0, 0, 1]}}}, "by_distance: found no weight"),
        ({"editors": {"number": {}}, "per_caption": "all"}, "per_caption"),
        ("tests.data.counterfactuals.test_editors:ALL", "not a subclass"),
    ],
)
def test_wrong_editors_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CounterfactualsConfig.model_validate(given)


@pytest.mark.parametrize("form", ["number", ["number"], {"editors": {"number": None}}, {"editors": {"number": {}}}])
def test_a_name_alone_stands_for_an_editor(form: Any) -> None:
    assert CounterfactualsConfig.model_validate(form) == config({"number": {}})


def test_no_word_is_two_things_of_a_group_and_every_plural_comes_back() -> None:
    for lexicon in (COLOUR_WORDS, ATTRIBUTE_WORDS, NOUN_WORDS):
        for group, things in lexicon.things.items():
            assert len(set(things.singular)) == len(things.singular) >= 2, group
    for things in NOUN_WORDS.things.values():
        for word in things.singular:
            assert singular(plural(word)) == word


@pytest.mark.slow
def test_on_real_captions_every_edit_differs_and_is_no_caption_of_its_picture() -> None:
    folder = os.environ.get("VLM_TEST_DATA")
    if folder is None:
        pytest.skip("VLM_TEST_DATA is not set: it names the folder of flickr8k-test-000000.tar")
    editors, counts = config(ALL, per_caption="each"), Counter[str]()
    with tarfile.open(Path(folder) / "flickr8k-test-000000.tar") as shard:
        stored = [json.load(shard.extractfile(member)) for member in shard if member.name.endswith(".json")]  # type: ignore[arg-type]
    for number, fields in enumerate(stored):
        captions = tuple(fields["captions"])
        for text in captions:
            for one in counterfactuals(CaptionInSample(text, captions), editors, (0, 0, number)).made:
                assert one.text.lower().split() not in [other.lower().split() for other in captions]
                counts[one.editor] += 1
    assert len(counts) == len(ALL)
    assert counts["word_order"] > 4900
    assert counts["number"] > 400
