"""A tokenizer and a text tower that do not speak of the same tokens are refused before a step is lost on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vlm.model.hugging_face import save_text_model, save_tokenizer
from tests.vlm.model.tiny import TEXTS, VIT, architecture, tiny_model
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.tokenizer import Tokenizer, full_tokenizer


def with_text(folder: Path, **text: Any) -> DualEncoder:
    text = {"transformers": str(folder), "context_length": 16, **text}
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": text}
    return build_model(ModelConfig.model_validate({"towers": towers}))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    with pytest.raises(UserError, match=r"49,408 tokens, but the text tower's vocabulary only 49,407"):
        tiny_model(architecture=architecture(text={"vocab_size": 49407}))


def test_a_text_model_saved_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    """The library would make one of special tokens, to which every word is unknown."""
    save_text_model(tmp_path / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / file).unlink()
    with pytest.raises(UserError, match="mute holds no tokenizer"):
        with_text(tmp_path / "mute")
    (tmp_path / "words").mkdir()
    save_tokenizer(tmp_path / "words")
    model = with_text(tmp_path / "mute", tokenizer=str(tmp_path / "words"))
    assert model.tokenizer(TEXTS).lengths.tolist() == [len(text.split()) + 2 for text in TEXTS]


def test_a_tokenizer_far_smaller_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    save_text_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {word: n for word, n in content["model"]["vocab"].items() if n < 4}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has 4 tokens of the text tower's 21: it is not the model's own"):
        with_text(tmp_path)


def test_a_tokenizer_that_knows_nearly_no_word_of_the_captions_is_told(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    full = full_tokenizer({"hf_tokenizer_name": str(tmp_path), "context_length": 16})
    unknown = ["Katze sitzt auf Matte"] * 32
    tokenizer = Tokenizer(full, shorten=True)
    tokenizer(unknown)
    with pytest.raises(UserError, match="256 of the first 256 tokens are unknown to the tokenizer"):
        tokenizer(unknown)
    some = Tokenizer(full, shorten=True)
    for _ in range(4):
        assert len(some([*unknown, *TEXTS * 4]).tokens) == 48  # a fifth of the words is known
    for _ in range(4):
        some(unknown)  # the first texts have shown that it is the right one


def test_a_token_beyond_the_vocabulary_is_no_index_error(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path)
    full = full_tokenizer({"hf_tokenizer_name": str(tmp_path), "context_length": 16})
    tokenizer = Tokenizer(full, shorten=True, vocabulary=size - 1)
    assert torch.equal(tokenizer(["a dog"]).tokens, Tokenizer(full, shorten=True)(["a dog"]).tokens)
    with pytest.raises(UserError, match=f"made token {size - 1} of a text, but the text tower knows only {size - 1}"):
        tokenizer(["wet"])
