"""Captions as shards store them."""

import pytest

from data.bad_sample import BadSampleError
from data.captions import choose_caption, read_captions, read_fields
from data.randomness import Draws


@pytest.mark.parametrize(
    ("text", "fields", "captions"),
    [
        (b" a cat\n", {}, ("a cat",)),
        ("ein Kätzchen".encode(), {}, ("ein Kätzchen",)),
        (None, {"captions": ["  one ", "", "two", " \n"]}, ("one", "two")),
        (None, {"captions": "only one"}, ("only one",)),
        (None, {"caption": "single"}, ("single",)),
        (b"from txt", {"caption": "from json"}, ("from txt",)),
        (b"from txt", {"captions": ["from json"]}, ("from json",)),
        (b"  \n", {}, ()),
        (None, {}, ()),
        (None, {"caption": None}, ()),
    ],
)
def test_captions_are_stripped_and_empty_ones_are_none(
    text: bytes | None, fields: dict[str, object], captions: tuple[str, ...]
) -> None:
    assert read_captions(text, fields) == captions


def test_what_is_no_text_is_a_bad_sample_with_a_reason() -> None:
    with pytest.raises(BadSampleError, match="not UTF-8"):
        read_captions(b"caf\xe9", {})
    with pytest.raises(BadSampleError, match="no text but 7"):
        read_captions(None, {"captions": ["fine", 7]})
    with pytest.raises(BadSampleError, match="json cannot be read"):
        read_fields(b'{"captions": [')
    with pytest.raises(BadSampleError, match="json cannot be read"):
        read_fields(b'{"captions": "\xff"}')
    with pytest.raises(BadSampleError, match="no object but a list"):
        read_fields(b"[1]")


def test_the_policies() -> None:
    captions = ("a", "b", "c", "d", "e")
    assert choose_caption(captions, "first", Draws(0)) == "a"
    chosen = [choose_caption(captions, "random", Draws("caption", n)) for n in range(1000)]
    assert all(abs(chosen.count(caption) - 200) < 5 * (1000 * 0.2 * 0.8) ** 0.5 for caption in captions)
    with pytest.raises(BadSampleError, match="no caption"):
        choose_caption((), "random", Draws(0))
