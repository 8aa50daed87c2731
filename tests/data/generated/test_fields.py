"""A generated caption is one more of a list, beside where it is from; nothing else in a json changes."""

import json
from typing import Any

import pytest

from data.generated.fields import CaptionField, GeneratedCaption, Origin
from data.samples.bad_sample import BadSampleError
from data.samples.captions import CaptionConfig, captions_by_field
from vlm.errors import UserError

FIRST, SECOND = Origin("0123", {"method": "greedy"}), Origin("0123", {"method": "beam", "beams": 3})
DOG, CAT = GeneratedCaption("a dog", -4.5, 2, 0.31), GeneratedCaption("ein Kätzchen", -7.25, 3, -0.02)


def test_captions_of_two_runs_stand_beside_each_other_with_their_origins() -> None:
    fields: dict[str, Any] = {"captions": ["by a person"], "url": None, "width": 10**30, "near": 0.1}
    once = json.loads(CaptionField().added(fields, DOG, FIRST))
    twice = json.loads(CaptionField().added(once, CAT, SECOND))
    assert {name: twice[name] for name in fields} == fields
    assert twice["generated_captions"] == ["a dog", "ein Kätzchen"]
    assert twice["generated_captions_provenance"] == [
        {"model": "0123", "method": "greedy", "log_likelihood": -4.5, "num_tokens": 2, "cosine": 0.31},
        {"model": "0123", "method": "beam", "beams": 3, "log_likelihood": -7.25, "num_tokens": 3, "cosine": -0.02},
    ]
    assert CaptionField().found(twice, FIRST) == DOG
    assert CaptionField().found(twice, SECOND) == CAT
    assert CaptionField().found(once, SECOND) is None
    assert captions_by_field(b"by a person", twice, CaptionConfig()) == {"captions": ("by a person",)}


def test_among_captions_those_by_people_have_no_origin() -> None:
    among = CaptionField("captions", among_captions=True)
    made = json.loads(among.added({"captions": "by a person"}, DOG, FIRST))
    assert made["captions"] == ["by a person", "a dog"]
    assert made["captions_provenance"][0] is None
    assert among.found(made, FIRST) == DOG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "https://a/b.jpg"}, "has a field url already, without url_provenance"),
        ({"url": 3}, "no text but 3"),
        ({"url": ["a"], "url_provenance": [{}, {}]}, "not as long as url"),
        ({"url_provenance": "x"}, "not as long as url"),
        ({"near": "x" * (16 << 20)}, "would have 16,777,"),
    ],
)
def test_what_stands_there_already_is_not_changed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSampleError, match=message):
        CaptionField("url").added(fields, DOG, FIRST)


def test_a_tampered_origin_is_nobodys() -> None:
    made = json.loads(CaptionField().added({}, DOG, FIRST))
    made["generated_captions_provenance"][0]["cosine"] = "high"
    assert CaptionField().found(made, FIRST) is None


@pytest.mark.parametrize(
    ("name", "among", "message"),
    [
        ("captions", False, "--field: captions is where captions are looked for by themselves"),
        ("caption", False, "say --among-captions"),
        ("txt", True, "--field: txt is a member of its own"),
        ("two words", False, "--field: found 'two words'"),
        ("", False, "--field: found ''"),
        ("generated", True, "--among-captions: means nothing with --field generated"),
    ],
)
def test_a_field_that_would_be_read_in_silence_is_refused(name: str, among: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CaptionField(name, among)
