"""Each kind of text tower computes at the batch's length what open_clip computes at full length."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from tests.vlm.model.hugging_face import save_text_model, save_tokenizer
from tests.vlm.model.tiny import TEXTS, architecture, open_clip_twin, perturb, some_images, tiny_model
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.open_clip_towers import CausalTextTower, PaddedTextTower

CAUSAL: dict[str, dict[str, Any]] = {
    "clip": {},
    "eos": {"pool_type": "eos", "eos_id": 49407},
    "biased projection": {"proj_bias": True},
    "no projection": {"proj_type": "none", "width": 24},
    "custom block": {"qk_norm": True, "ls_init_value": 0.1},
}
PADDED: dict[str, dict[str, Any]] = {
    "siglip": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    "coca": {"embed_cls": True, "output_tokens": True},
    "first": {"no_causal_mask": True, "pool_type": "first"},
    "bidirectional argmax": {"no_causal_mask": True},
}


def _pair(text: dict[str, Any]) -> tuple[Any, Any]:
    model = tiny_model(architecture=architecture(text=text))
    perturb(model)
    fields = architecture(text={**text, "output_tokens": False})
    return model.double().eval(), open_clip_twin(model, fields).double()


def _reference_tokens(model: Any) -> torch.Tensor:
    return open_clip.get_tokenizer("ViT-B-32")(TEXTS, context_length=model.text.context_length)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_tower_needs_no_padding(kind: str) -> None:
    model, twin = _pair(CAUSAL[kind])
    assert isinstance(model.text, CausalTextTower)
    tokens, lengths = model.tokenizer(TEXTS)
    assert tokens.shape[1] == int(lengths.max()) < model.text.context_length
    torch.testing.assert_close(
        model.encode_text(tokens, lengths),
        twin.encode_text(_reference_tokens(model), normalize=True),
        rtol=0,
        atol=1e-12,
    )


def test_causal_tower_has_the_gradient_of_full_length() -> None:
    model, twin = _pair({})
    target = torch.randn(len(TEXTS), 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (model.encode_text(*model.tokenizer(TEXTS)) * target).sum().backward()
    (twin.encode_text(_reference_tokens(model), normalize=True) * target).sum().backward()
    theirs = dict(twin.named_parameters())
    compared = [name for name, _ in model.text.named_parameters()]
    assert len(compared) == sum(not name.startswith(("visual", "logit")) for name in theirs)
    for name in compared:
        torch.testing.assert_close(model.text.get_parameter(name).grad, theirs[name].grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", PADDED)
def test_other_towers_are_padded_back(kind: str) -> None:
    model, twin = _pair(PADDED[kind])
    assert isinstance(model.text, PaddedTextTower)
    tokens, lengths = model.tokenizer(TEXTS)
    assert tokens.shape[1] == model.text.context_length
    expected = normalize(twin.text(_reference_tokens(model)), dim=-1)
    torch.testing.assert_close(model.encode_text(tokens, lengths), expected, rtol=0, atol=1e-12)
    # A batch that was cut all the same is brought back to full length.
    cut = tokens[:, : int(lengths.max())]
    torch.testing.assert_close(model.encode_text(cut, lengths), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", [{}, PADDED["siglip"]])
def test_padding_may_hold_anything(text: dict[str, Any]) -> None:
    model, _ = _pair(text)
    tokens, lengths = model.tokenizer(TEXTS)
    littered = tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], 49407)
    torch.testing.assert_close(model.encode_text(littered, lengths), model.encode_text(tokens, lengths), rtol=0, atol=0)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler"])
def test_hugging_face_text_tower_of_open_clip(tmp_path: Path, pooler: str) -> None:
    save_text_model(tmp_path, "bert")
    text = {
        "hf_model_name": str(tmp_path),
        "hf_tokenizer_name": str(tmp_path),
        "hf_model_pretrained": False,
        "hf_pooler_type": pooler,
        "hf_proj_type": "mlp",
        "context_length": 16,
    }
    fields = {**architecture(), "text_cfg": text}
    model = build_model(ModelConfig.model_validate({"architecture": fields})).eval()
    twin = open_clip_twin(model, fields)
    assert not model.text.may_shorten
    tokens = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=16)(TEXTS)
    found = model.tokenizer(TEXTS)
    assert torch.equal(found.tokens, tokens)
    torch.testing.assert_close(
        model.encode_text(found.tokens[:, : int(found.lengths.max())], found.lengths),
        twin.encode_text(tokens, normalize=True),
        rtol=0,
        atol=1e-6,
    )


def test_a_tower_pooled_at_the_largest_id_is_not_cut_when_padding_is_larger(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, end_is_padding=True)
    model = tiny_model(architecture=architecture(text={"hf_tokenizer_name": str(tmp_path)}))
    assert not model.text.may_shorten
    assert model.tokenizer(TEXTS).tokens.shape[1] == model.text.context_length


TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": ""}


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True},
    ],
)
def test_image_tower_normalises_and_encodes_as_open_clip(vision: dict[str, Any]) -> None:
    base: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    model = tiny_model(architecture=architecture({**base, **vision})).eval()
    twin = open_clip_twin(model, architecture({**base, **vision, "output_tokens": False}))
    spec, images = model.image_spec, some_images()
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    expected = twin.encode_image((images / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(model.encode_image(images), expected, rtol=0, atol=1e-6)


def test_a_timm_tower_takes_the_configured_image_size() -> None:
    timm = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "image_size": 64}
    model = tiny_model(architecture=architecture(timm)).eval()
    assert model.image_spec.size == 64
    assert model.encode_image(some_images(2, 64)).shape == (2, 24)


@pytest.mark.parametrize(
    ("vision", "text", "words"),
    [
        ({"width": 32, "patch_size": 8, "layers": 1}, {}, "vision_cfg: open_clip cannot build this image tower"),
        (None, {"width": 30, "heads": 4}, "text_cfg: open_clip cannot build this text tower"),
        ({"timm_model_name": "no_such_model"}, {}, "no_such_model"),
        ({**TIMM, "image_size": 8}, {}, "image"),
        ({**TIMM, "image_size": 41}, {}, "image"),
    ],
)
def test_impossible_towers_are_refused_in_one_line(vision: dict[str, Any], text: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        tiny_model(architecture=architecture(vision, text))
    assert "\n" not in str(caught.value)
