"""A mistake in a model's configuration is told in one line, with the nearest right name."""

from typing import Any

import open_clip
import pytest
from pydantic import ValidationError

from tests.vlm.model.tiny import architecture
from vlm.config import first_problem
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import Architecture, ModelConfig


def test_every_architecture_of_open_clip_is_accepted() -> None:
    names = open_clip.list_models()
    assert len(names) > 100
    for name in names:
        Architecture.model_validate(open_clip.get_model_config(name))


def towers(image: Any) -> dict[str, Any]:
    return {"towers": {"embed_dim": 8, "image": image, "text": {"text_cfg": {}}}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of open_clip, architecture, transformers, towers is needed; found none of them"),
        ({"open_clip": "ViT-B-32", "architecture": architecture()}, "found open_clip and architecture"),
        ({"architecture": architecture({"widht": 32})}, "widht: unknown key (value 32); nearest: width"),
        (
            {"architecture": architecture(text={"contextlength": 3})},
            "contextlength: unknown key (value 3); nearest: cont",
        ),
        ({"architecture": architecture({"width": "wide"})}, "width: found 'wide'"),
        ({"architecture": {**architecture(), "embed_dim": 0}}, "architecture.embed_dim: found 0"),
        (
            {"open_clip": "ViT-B-32", "pretraind": "openai"},
            "pretraind: unknown key (value 'openai'); nearest: pretrained",
        ),
        (
            {"towers": {"embed_dim": 8, "image": {}, "text": {"text_cfg": {}}}},
            "towers.image: exactly one of joined, open_clip, timm, transformers, vision_cfg is needed, or package",
        ),
        (towers({"timm": "resnet18", "transformers": "vit"}), "or package.module:Class; found timm and transformers"),
        (towers({"tim": "resnet18"}), "towers.image.tim: unknown key (value 'resnet18'); nearest: timm"),
        (towers({"timm": "resnet18", "pretraind": 1}), "towers.image.pretraind: unknown key (value 1); nearest: pretr"),
        (towers({"timm": 5}), "towers.image.timm: found 5; input should be a valid string"),
        (towers({"vision_cfg": {"widht": 3}}), "towers.image.vision_cfg: widht: unknown key (value 3); nearest: width"),
        (towers("resnet18"), "towers.image: found 'resnet18'; input should be a valid dictionary"),
        (towers({"nowhere.towers:Mine": {}}), "towers.image: image tower 'nowhere.towers:Mine': No module named"),
        (
            towers({"tests.vlm.model.own_towers:OwnImage": {"widht": 3}}),
            "towers.image.tests.vlm.model.own_towers:OwnImage.widht: unknown key (value 3); nearest: width",
        ),
        (
            towers({"tests.vlm.model.own_towers:OwnImage": {}, "weights": "a"}),
            "towers.image.weights: an option of tests.vlm.model.own_towers:OwnImage is written within it",
        ),
        (
            {**towers({"timm": "resnet18", "weights": "a"}), "pretrained": "b"},
            "found pretrained and towers.image.weights; one of them says where weights are",
        ),
        ({"open_clip": "ViT-B-32", "init_logit_scale": 101}, "init_logit_scale: found 101"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(fields)
    assert words in first_problem(caught.value, ModelConfig)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"open_clip": "ViT-B-23"}, "open_clip: unknown model 'ViT-B-23'; nearest: ViT-B-32"),
        ({"architecture": architecture({"image_size": [32, 64]})}, "images must be square"),
        (towers({"timm": "resnet81"}), "^towers.image.timm: there is no model 'resnet81'; nearest: resnet18"),
        (towers({"timm": "hf-hub:someone/model"}), "^towers.image.timm: there is no model 'hf-hub:someone/model'"),
        (towers({"open_clip": "ViT-B-23"}), "^towers.image.open_clip: unknown model 'ViT-B-23'; nearest: ViT-B-32"),
        ({"open_clip": "RN50"}, "the image tower normalises over the local batch .* freeze_batch_norm: true"),
    ],
)
def test_what_cannot_be_built_is_a_user_error(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_model(ModelConfig.model_validate(fields))
    assert "\n" not in str(caught.value)
