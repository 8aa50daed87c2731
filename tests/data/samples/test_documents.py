"""Stored documents: both forms, what is wrong with some, and the tokens and images that a model reads of them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from data.documents_config import DocumentsConfig
from data.samples.bad_sample import BadSampleError
from data.samples.document_tokens import DocumentTokenizer, DocumentTokens
from data.samples.documents import ImagePlace, document_pieces
from vlm.model.tokenizer import Tokenizer, full_tokenizer

CONTEXT = 12
BEGIN, END = 49406, 49407
A, DOG, AND, CAT, COLON = 320, 1929, 537, 2368, 281


def config(**fields: Any) -> DocumentsConfig:
    return DocumentsConfig.model_validate({"sources": {"web": {"shards": "x.tar"}}, "per_step": 1, **fields})


def tokens(pieces: list[str | int], **fields: Any) -> DocumentTokens:
    """Of a document in which numbers stand for images."""
    tokenizer = Tokenizer(full_tokenizer({"context_length": CONTEXT}), shorten=True)
    written = [piece if isinstance(piece, str) else ImagePlace(f"{piece}.jpg") for piece in pieces]
    return DocumentTokenizer(tokenizer, config(**fields))(written)


LAID_OUT = ("A dog ", ImagePlace("0.jpg"), " and ", ImagePlace("1.png"), "")


@pytest.mark.parametrize(
    "fields",
    [
        {"images": ["0.jpg", "1.PNG"], "text": "A dog <image> and <image>"},
        {"images": ["0.jpg", "1.png"], "texts": ["A dog ", None, " and ", None, ""]},
        {"images": [None, "0.jpg", None, "1.png", None], "texts": ["A dog ", None, " and ", None, ""]},
    ],
)
def test_all_forms_say_the_same(fields: dict[str, Any]) -> None:
    assert document_pieces(fields, "<image>") == LAID_OUT


def test_a_mark_of_ones_own_leaves_the_usual_one_as_text() -> None:
    fields = {"images": ["0.jpg"], "text": "<image> is [IMG] a mark"}
    assert document_pieces(fields, "[IMG]") == ("<image> is ", ImagePlace("0.jpg"), " a mark")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"images": ["0.jpg"], "text": "a <image> b <image>"}, "2 places of images, and its json names 1"),
        ({"images": ["0.jpg", "1.jpg"], "texts": ["a", None]}, "1 places of images, and its json names 2"),
        ({"images": ["0.jpg", None], "texts": [None, None]}, "not in turn"),
        ({"images": ["0.jpg", None], "texts": ["a", None]}, "not in turn"),
        ({"images": ["0.jpg"], "text": " <image> "}, "it has no text"),
        ({"images": ["0.jpg"]}, "neither a `text` nor a list of `texts`"),
        ({"images": ["0.jpg"], "text": 3}, "neither a `text` nor a list of `texts`"),
        ({"text": "a <image>"}, "no list of `images`"),
        ({"images": "0.jpg", "text": "a <image>"}, "no list of `images`"),
        ({"images": [["0.jpg"]], "text": "a <image>"}, "an image of it is no text"),
        ({"images": ["0.jpg"], "texts": [{"a": 1}, None]}, "a text of it is no text"),
    ],
)
def test_what_does_not_agree_is_bad(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSampleError, match=reason):
        document_pieces(fields, "<image>")


def test_each_token_knows_the_images_before_it() -> None:
    found = tokens([0, "a dog", 1, 2, "and a cat"])
    assert found == DocumentTokens(
        ids=(BEGIN, A, DOG, AND, A, CAT, END),
        before=(0, 1, 1, 3, 3, 3, 3),
        told=(False, True, True, True, True, True, True),
        images=("0.jpg", "1.jpg", "2.jpg"),
    )


def test_text_at_the_place_of_an_image_is_read_and_not_told() -> None:
    found = tokens(["a dog", 0, "and", 1], image_text=":")
    assert found.ids == (BEGIN, A, DOG, COLON, AND, END)
    assert found.before == (0, 0, 0, 1, 1, 1)
    assert found.told == (False, True, True, False, True, True)


@pytest.mark.parametrize(
    ("pieces", "fields", "ids", "images"),
    [
        (["a", 0, "dog", 1], {}, (BEGIN, A, DOG, END), ("0.jpg",)),  # behind the last image there is no text
        (["a", 0, "dog", 1, "cat"], {"max_images": 1}, (BEGIN, A, DOG, END), ("0.jpg",)),
        (["a", 0, "dog and", 1, "cat"], {"max_tokens": 5}, (BEGIN, A, DOG, AND, END), ("0.jpg",)),
        (["a", 0, "dog and", 1, "cat"], {"max_tokens": 6}, (BEGIN, A, DOG, AND, CAT, END), ("0.jpg", "1.jpg")),
        (["a", 0, "dog and cat"], {"max_tokens": 3}, (BEGIN, A, END), ()),
        (["dog", 0, "cat " * 30, 1, "a"], {}, (BEGIN, DOG, *[CAT] * (CONTEXT - 3), END), ("0.jpg",)),
        (["dog " * 30, 0, "a"], {}, (BEGIN, *[DOG] * (CONTEXT - 2), END), ()),
    ],
)
def test_what_lies_behind_the_cut_is_left_out_images_too(
    pieces: list[str | int], fields: dict[str, Any], ids: tuple[int, ...], images: tuple[str, ...]
) -> None:
    found = tokens(pieces, **fields)
    assert (found.ids, found.images) == (ids, images)
    assert found.before[-1] == len(images)


def test_what_lies_far_behind_the_cut_is_not_tokenized() -> None:
    texts: list[str] = []

    class Counting(Tokenizer):
        def inner(self, given: Sequence[str]) -> list[list[int]]:
            texts.extend(given)
            return super().inner(given)

    tokenizer = DocumentTokenizer(Counting(full_tokenizer({"context_length": CONTEXT}), shorten=True), config())
    pieces = ["", *["a"] * 30, *["dog " * 1000] * 1000]
    assert tokenizer(pieces).ids == (BEGIN, *[A] * (CONTEXT - 2), END)
    assert len(texts) < 50


def test_a_document_whose_text_begins_behind_the_cut_is_bad() -> None:
    with pytest.raises(BadSampleError, match="no text in its first 12 tokens and 2 images"):
        tokens([0, 1, 2, "a dog"], max_images=2)


@pytest.mark.parametrize(("seen", "seen_from"), [("last", [0, 0, 1, 1, 0]), ("all", [0, 0, 0, 0, 0])])
def test_the_part_says_what_is_seen_while_the_next_token_is_told(seen: str, seen_from: list[int]) -> None:
    tokenizer = Tokenizer(full_tokenizer({"context_length": CONTEXT}), shorten=True)
    reader = DocumentTokenizer(tokenizer, config(images_seen=seen))
    both = [tokens(["a", 0, "dog", 1, "and"]), tokens(["a"])]
    part = reader.part(both, [1, 3])
    assert part.tokens.tolist() == [[BEGIN, A, DOG, AND, END], [BEGIN, A, END, 0, 0]]
    assert part.seen_to.tolist() == [[0, 1, 2, 2, 0], [0] * 5]
    assert part.seen_from.tolist() == [seen_from, [0] * 5]
    assert part.told.tolist() == [[False, *[True] * 4], [False, True, True, False, False]]
    assert (part.num_images.tolist(), part.lengths.tolist()) == ([2, 0], [5, 3])
    assert torch.equal(part.owners, torch.tensor([1, 3]))  # type: ignore[arg-type]
    nothing = reader.part([], [])
    assert nothing.tokens.shape == (0, 2)


def test_no_document_is_no_longer_than_a_batch_that_is_never_shortened() -> None:
    full = Tokenizer(full_tokenizer({"context_length": CONTEXT}), shorten=False)
    assert DocumentTokenizer(full, config()).part([], []).tokens.shape == (0, CONTEXT)
