"""Causal language models by their parts, against the library's own forward; texts between marks."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, Qwen2Config

from tests.vlm.model.hugging_face import save_language_model, save_text_model
from tests.vlm.model.tiny import TEXTS, VIT, some_images
from vlm.batch import Images, Texts
from vlm.errors import UserError
from vlm.model.attention import LayerCache
from vlm.model.build import build_model
from vlm.model.causal_models import FAMILIES, CausalModel, family_of, sees_all
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.outputs import PAIR

CAPTIONER: dict[str, Any] = {"layers": 1, "heads": 2, "queries": 4, "pooler_heads": 2}


def built(folder: Path, captioner: Any = "none", **text: Any) -> DualEncoder:
    text = {"transformers": str(folder), "context_length": 16, "pool": "end", **text}
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": text}
    return build_model(ModelConfig.model_validate({"towers": towers, "captioner": captioner})).eval()


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_layer_by_layer_it_is_the_librarys_forward(tmp_path: Path, kind: str) -> None:
    theirs = save_language_model(tmp_path, kind, weights=False).double()
    ids = torch.randint(3, theirs.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    model, cache = CausalModel(theirs.base_model), list[LayerCache]()
    embedded = model.tokens(ids)
    whole = theirs.lm_head(model.norm(model.next_states(embedded)))
    pieces = [model.next_states(piece, cache) for piece in embedded.split([4, 1, 4], 1)]
    in_pieces = theirs.lm_head(model.norm(torch.cat(pieces, 1)))
    exact = 1e-5 if kind == "gpt_neo" else 1e-12  # whose attention is computed in fp32
    torch.testing.assert_close(whole, expected, rtol=0, atol=exact)
    torch.testing.assert_close(in_pieces, expected, rtol=0, atol=exact)


def test_other_families_and_windows_are_told() -> None:
    with pytest.raises(UserError, match=r"model_type bert is no causal language model .*gpt2.*llama.*qwen3"):
        family_of(BertConfig())
    short = Qwen2Config(use_sliding_window=True, sliding_window=8)
    assert [sees_all(short, length) for length in (8, 9)] == [True, False]
    assert sees_all(Qwen2Config(), 10_000)


@pytest.mark.parametrize(("kind", "start", "end"), [("gpt2", 0, 0), ("llama", 0, 1)])
def test_texts_get_the_marks_that_their_tokenizer_leaves_out(tmp_path: Path, kind: str, start: int, end: int) -> None:
    save_language_model(tmp_path, kind)
    tokenizer = built(tmp_path, CAPTIONER).tokenizer
    texts = ["a dog", "", " ".join(["street"] * 30), "a dog <|endoftext|> </s>"]
    tokens, lengths = pickle.loads(pickle.dumps(tokenizer))(texts)  # noqa: S301 - as workers get it
    assert lengths.tolist() == [4, 2, 16, 5]
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        assert row[0] == start
        assert row[length - 1] == end
        assert {start, end}.isdisjoint(row[1 : length - 1])  # also where they are written
        assert set(row[length:]) <= {end}
    assert tokenizer.decode(tokens[0].tolist()) == "a dog"


@torch.no_grad()
def test_without_a_captioner_tokens_are_the_librarys(tmp_path: Path) -> None:
    save_text_model(tmp_path, "gpt2")
    plain, captioned = built(tmp_path), built(tmp_path, CAPTIONER)
    assert torch.equal(plain.tokenizer(TEXTS).tokens, captioned.tokenizer(TEXTS).tokens)  # both ends are marked
    assert torch.equal(plain.encode_text(*plain.tokenizer(TEXTS)), captioned.encode_text(*plain.tokenizer(TEXTS)))
    save_language_model(tmp_path / "llama", "llama")
    with pytest.raises(UserError, match="has no padding token"):
        built(tmp_path / "llama")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_padding_changes_no_likelihood(tmp_path: Path, kind: str) -> None:
    save_language_model(tmp_path, kind)
    model, images = built(tmp_path, CAPTIONER), Images(some_images(4))
    tokens, lengths = model.tokenizer(TEXTS)
    outputs = PAIR | {"text_likelihood"}
    together = model({"image": images, "text": Texts(tokens, lengths)}, outputs)
    for row, alone in enumerate(TEXTS):
        made = model({"image": Images(images.pixels[row : row + 1]), "text": Texts(*model.tokenizer([alone]))}, outputs)
        torch.testing.assert_close(made["text"][0], together["text"][row], rtol=0, atol=1e-6)
        told = together["text_likelihood"].split((lengths - 1).tolist())[row]
        torch.testing.assert_close(made["text_likelihood"], told, rtol=0, atol=1e-5)
