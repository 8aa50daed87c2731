"""transformers models as towers: exact at any padding, frozen where unused, refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.vlm.model.hugging_face import save_text_model, save_tokenizer, save_vision_model
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, outputs_of, some_images
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder


def _model(image: dict[str, Any], text: dict[str, Any]) -> DualEncoder:
    towers = {"embed_dim": 24, "image": image, "text": text}
    return build_model(ModelConfig.model_validate({"towers": towers})).eval()


def projected(tower: torch.nn.Module, pooled: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = tower.get_submodule("projection")(pooled)
    return rows


def _pooled(hidden: torch.Tensor, length: int, pool: str) -> torch.Tensor:
    return {"mean": hidden[:length].mean(0), "first": hidden[0], "end": hidden[length - 1]}[pool]


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        ("bert", "mean"),
        ("bert", "first"),
        ("distilbert", "mean"),
        ("roberta", "end"),
        ("xlm-roberta", "mean"),
        ("gpt2", "end"),
    ],
)
def test_text_tower_at_the_batch_length_is_the_model_on_each_text_alone(tmp_path: Path, kind: str, pool: str) -> None:
    save_text_model(tmp_path, kind)
    model = _model({"vision_cfg": VIT}, {"transformers": str(tmp_path), "pool": pool, "context_length": 16})
    assert model.text.may_shorten
    tokens, lengths = model.tokenizer(TEXTS)
    assert tokens.shape[1] == int(lengths.max()) < 16
    own = transformers.AutoModel.from_pretrained(tmp_path).eval()
    rows = []
    for ids, length in zip(tokens, lengths.tolist(), strict=True):
        hidden = own(input_ids=ids[None, :length]).last_hidden_state[0]
        rows.append(projected(model.text, _pooled(hidden, length, pool)))
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    torch.testing.assert_close(model.encode_text(tokens, lengths), expected, rtol=0, atol=1e-6)


def test_unknown_kinds_of_text_model_get_the_full_context(tmp_path: Path) -> None:
    save_text_model(tmp_path, "electra")
    model = _model({"vision_cfg": VIT}, {"transformers": str(tmp_path), "context_length": 16})
    assert model.tokenizer(TEXTS).tokens.shape[1] == 16


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        ("vit", "first"),
        ("clip_vision_model", "pooler"),
        ("clip_vision_model", "mean"),
        ("siglip_vision_model", "pooler"),
    ],
)
def test_image_tower_is_the_vision_model_pooled_and_projected(tmp_path: Path, kind: str, pool: str) -> None:
    save_vision_model(tmp_path, kind)
    model = _model({"transformers": str(tmp_path), "pool": pool}, {"text_cfg": TEXT})
    images, spec = some_images(), model.image_spec
    assert spec.size == 32
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    output = transformers.AutoModel.from_pretrained(tmp_path).eval()(pixel_values=(images / 255 - mean) / std)
    hidden = output.last_hidden_state
    pooled = {"pooler": output.pooler_output, "first": hidden[:, 0], "mean": hidden.mean(1)}[pool]
    expected = torch.nn.functional.normalize(projected(model.image.trunk, pooled), dim=-1)
    torch.testing.assert_close(model.encode_image(images), expected, rtol=0, atol=1e-6)


def test_every_trainable_parameter_gets_a_gradient(tmp_path: Path) -> None:
    save_vision_model(tmp_path / "image", "clip_vision_model")
    save_text_model(tmp_path / "text", "bert")
    image, text = {"transformers": str(tmp_path / "image"), "pool": "mean"}, {"transformers": str(tmp_path / "text")}
    model = _model(image, {**text, "context_length": 16}).train()
    outputs = outputs_of(model, some_images(4))
    ((outputs["image"] @ outputs["text"].T) * outputs["logit_scale"]).square().sum().backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trainable.values())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert any("pooler" in name for name in frozen)
    assert any("post_layernorm" in name for name in frozen)


def test_preprocessing_comes_from_the_image_processor(tmp_path: Path) -> None:
    save_vision_model(tmp_path)
    processor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2)
    processor.save_pretrained(tmp_path)
    spec = _model({"transformers": str(tmp_path)}, {"text_cfg": TEXT}).image_spec
    assert (spec.size, spec.mean, spec.std, spec.interpolation) == (32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")


def test_rebuilding_reads_no_weights(tmp_path: Path) -> None:
    save_vision_model(tmp_path)
    model = _model({"transformers": str(tmp_path)}, {"text_cfg": TEXT})
    (tmp_path / "model.safetensors").unlink()
    again = build_model(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.encode_image(some_images()), model.encode_image(some_images()))


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (None, {}, "towers.text.transformers"),
        ("bert", {"context_length": 50}, "towers.text.transformers"),
        ("gpt2", {"pool": "pooler"}, "the model has no pooler"),
    ],
)
def test_unusable_text_models_are_refused(tmp_path: Path, kind: str | None, text: dict[str, Any], words: str) -> None:
    if kind is None:
        save_tokenizer(tmp_path)
    else:
        save_text_model(tmp_path, kind)
    with pytest.raises(UserError, match=words) as caught:
        _model({"vision_cfg": VIT}, {"transformers": str(tmp_path), "context_length": 16, **text})
    assert "\n" not in str(caught.value)
