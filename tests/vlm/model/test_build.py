"""Building: seeded, without a trace in the caller's random state, and rebuilt from the model's own configuration."""

import math

import pytest
import torch

from tests.vlm.model.tiny import TEXTS, architecture, some_images, tiny_model
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.resolve import image_spec, resolve


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(11)
    first = tiny_model(seed=3).state_dict()
    torch.manual_seed(12)
    again, other = tiny_model(seed=3).state_dict(), tiny_model(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["text.token_embedding.weight"], other["text.token_embedding.weight"])


def test_the_callers_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    tiny_model(seed=3)
    assert torch.equal(torch.rand(4), expected)


def test_own_configuration_rebuilds_the_model_through_json() -> None:
    model = tiny_model(
        image_size=64, image_mean=[0.5, 0.5, 0.5], resize_mode="squash", quick_gelu=True, init_logit_bias=-10
    )
    text = model.config.model_dump_json()
    again = build_model(ModelConfig.model_validate_json(text))
    assert again.config == model.config
    assert again.image_spec == model.image_spec
    again.load_state_dict(model.state_dict())
    again.eval(), model.eval()
    assert torch.equal(again.encode_image(some_images(2, 64)), model.encode_image(some_images(2, 64)))
    assert torch.equal(again.encode_text(*model.tokenizer(TEXTS)), model.encode_text(*model.tokenizer(TEXTS)))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"open_clip": "ViT-B-16-SigLIP"}, (224, 0.48145466, "shortest", False)),
        ({"open_clip": "ViT-B-16-SigLIP", "pretrained": "webli"}, (224, 0.5, "squash", False)),
        ({"open_clip": "ViT-B/32", "pretrained": "openai"}, (224, 0.48145466, "shortest", True)),
        (
            {"open_clip": "ViT-B/32", "pretrained": "openai", "quick_gelu": False, "image_size": 96},
            (96, 0.48145466, "shortest", False),
        ),
    ],
)
def test_a_pretrained_tag_decides_preprocessing_and_activation(
    fields: dict[str, object], expected: tuple[int, float, str, bool]
) -> None:
    resolved = resolve(ModelConfig.model_validate(fields))
    spec = image_spec(resolved)
    assert (spec.size, spec.mean[0], spec.resize_mode, resolved.quick_gelu) == expected


def test_a_caption_decoder_that_is_left_out_is_told() -> None:
    fields = {**architecture(), "multimodal_cfg": {"width": 32, "heads": 2, "layers": 1}}
    assert tiny_model(architecture=fields).notices == ()
    (line,) = tiny_model(architecture=fields, captioner="none").notices
    assert line.startswith("architecture: its caption decoder (multimodal_cfg) is left out")


def test_initial_scale_and_bias() -> None:
    model = tiny_model()
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.dtype == torch.float32
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.logit_bias is None
    siglip = tiny_model(init_logit_scale=10, init_logit_bias=-10)
    assert siglip.logit_scale.item() == pytest.approx(math.log(10))
    assert siglip.logit_bias is not None
    assert siglip.logit_bias.tolist() == [-10]
    fields = {**architecture(), "init_logit_scale": math.log(20), "init_logit_bias": -5}
    inherited = tiny_model(architecture=fields)
    assert inherited.logit_scale.exp().item() == pytest.approx(20)
    assert inherited.logit_bias is not None
    assert inherited.logit_bias.tolist() == [-5]
