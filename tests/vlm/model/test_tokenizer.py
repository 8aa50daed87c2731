"""Token ids are open_clip's, only the padding is shorter."""

import pickle
import re
from pathlib import Path
from random import Random

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.scenes.captions import caption
from data.scenes.layout import sample_scene
from tests.vlm.model.hugging_face import save_tokenizer
from tests.vlm.model.tiny import CONTEXT, TEXTS
from vlm.errors import UserError
from vlm.model.tokenizer import Tokenizer, full_tokenizer

REFERENCE = open_clip.get_tokenizer("ViT-B-32")
SCENES = Tokenizer(full_tokenizer({"hf_tokenizer_name": "vlm:scenes", "context_length": 256}), shorten=True)
SHORT = Tokenizer(full_tokenizer({"context_length": CONTEXT}), shorten=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_ids_of_any_text_are_those_of_open_clip(texts: list[str]) -> None:
    expected = REFERENCE(texts, context_length=CONTEXT)
    found = SHORT(texts)
    assert found.tokens.shape[1] == int(found.lengths.max())
    assert torch.equal(found.tokens, expected[:, : found.tokens.shape[1]])
    assert not expected[:, found.tokens.shape[1] :].any()


def test_length_counts_up_to_and_including_the_end_token() -> None:
    found = SHORT([*TEXTS, "", "word " * 100])
    assert found.lengths.tolist() == [4, 9, 3, 11, 2, CONTEXT]
    ends = found.tokens[torch.arange(6), found.lengths - 1]
    assert ends.tolist() == [REFERENCE.eot_token_id] * 6


@pytest.mark.parametrize("context", [1, 2, 3, 8])
def test_long_texts_are_cut_as_open_clip_cuts_them(context: int) -> None:
    found = Tokenizer(full_tokenizer({"context_length": context}), shorten=False)([*TEXTS, "word " * 100])
    assert torch.equal(found.tokens, REFERENCE([*TEXTS, "word " * 100], context_length=context))


def test_a_reduction_is_left_to_open_clip() -> None:
    kwargs = {"tokenizer_kwargs": {"reduction_mask": "simple"}, "context_length": CONTEXT}
    found = Tokenizer(full_tokenizer(kwargs), shorten=True)
    tokens, lengths = found([*TEXTS, "word " * 100])
    assert torch.equal(tokens[:4], REFERENCE(TEXTS, context_length=CONTEXT)[:, : tokens.shape[1]])
    assert lengths.tolist() == [4, 9, 3, 11, CONTEXT]


def test_each_word_of_a_scene_is_one_token_of_the_shipped_tokenizer() -> None:
    tokenizer = Tokenizer(full_tokenizer({"hf_tokenizer_name": "vlm:scenes", "context_length": 64}), shorten=True)
    rng = Random(5)
    texts = [one.text for _ in range(300) for one in caption(sample_scene(rng), rng)]
    tokens, lengths = tokenizer(texts)
    # Punctuation stands alone; so does each side of a hyphen.
    words = [len(re.findall(r"[\w]+|[^\w\s]", text)) for text in texts]
    assert lengths.tolist() == [number + 2 for number in words]
    assert int(tokens.max()) == 501  # the token at the end, which open_clip's towers find by its size
    assert [tokenizer.decode(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)] == texts


@given(st.text("abz AQZ09 .,;!?'\"()-éüßñ犬снег🐶\n\t", max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_shipped_tokenizer_takes_any_text(text: str) -> None:
    (row,), (length,) = SCENES([text])
    assert SCENES.decode(row[: int(length)].tolist()) == " ".join(text.lower().split())


def test_an_unknown_shipped_tokenizer_is_one_line() -> None:
    with pytest.raises(UserError, match="no tokenizer vlm:scene comes with vlm; nearest: vlm:scenes"):
        full_tokenizer({"hf_tokenizer_name": "vlm:scene"})


def test_full_length_when_the_tower_may_not_be_shortened() -> None:
    full = Tokenizer(full_tokenizer({}), shorten=False)
    assert torch.equal(full(TEXTS).tokens, REFERENCE(TEXTS))


def test_tokenizers_of_two_model_families_equal_get_tokenizer() -> None:
    for name in ("ViT-B-32", "coca_ViT-B-32"):
        text_cfg = open_clip.get_model_config(name)["text_cfg"]
        ours = Tokenizer(full_tokenizer(text_cfg), shorten=False)
        assert torch.equal(ours(TEXTS).tokens, open_clip.get_tokenizer(name)(TEXTS))


def test_no_texts_make_an_empty_batch() -> None:
    assert SHORT([]).tokens.shape == (0, CONTEXT)


def test_pickled_tokenizer_says_the_same() -> None:
    again = pickle.loads(pickle.dumps(SHORT))  # noqa: S301
    assert torch.equal(again(TEXTS).tokens, SHORT(TEXTS).tokens)


def test_hugging_face_tokenizer_from_a_local_folder(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    fields = {"hf_tokenizer_name": str(tmp_path), "context_length": CONTEXT}
    reference = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=CONTEXT)(TEXTS)
    found = Tokenizer(full_tokenizer(fields), shorten=True)(TEXTS)
    assert torch.equal(found.tokens, reference[:, : found.tokens.shape[1]])
    # [CLS] words [SEP]
    assert found.lengths.tolist() == [len(text.split()) + 2 for text in TEXTS]
    pickle.loads(pickle.dumps(Tokenizer(full_tokenizer(fields), shorten=True)))  # noqa: S301


def test_an_end_token_that_is_also_the_padding_counts_once(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, end_is_padding=True)
    found = Tokenizer(full_tokenizer({"hf_tokenizer_name": str(tmp_path), "context_length": CONTEXT}), shorten=True)(
        TEXTS
    )
    assert found.lengths.tolist() == [len(text.split()) + 2 for text in TEXTS]


def test_options_that_make_no_tokenizer_are_named() -> None:
    with pytest.raises(UserError, match=r"tokenizer_kwargs: {'clean': 'foo'} makes no tokenizer"):
        full_tokenizer({"tokenizer_kwargs": {"clean": "foo"}})


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: the tokenizer cannot be loaded"):
        full_tokenizer({"hf_tokenizer_name": str(tmp_path / "nowhere")})
