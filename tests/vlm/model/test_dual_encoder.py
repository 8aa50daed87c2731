"""The dual encoder's promises: unit vectors in fp32, a limited scale, and what is kept from weight decay."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.vlm.model.tiny import TEXTS, VIT, architecture, normalised, outputs_of, some_images, tiny_model
from vlm.batch import Images, Texts
from vlm.training.optimizers.parameters import no_weight_decay_names


def _norms(rows: torch.Tensor) -> torch.Tensor:
    return rows.double().square().sum(1).sqrt()


def test_embeddings_are_unit_vectors_in_fp32_under_bf16_autocast() -> None:
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(model, some_images(4))
    assert {name: output.dtype for name, output in outputs.items()} == dict.fromkeys(
        ("image", "text", "logit_scale"), torch.float32
    )
    image = outputs["image"]
    for rows in (image, outputs["text"]):
        torch.testing.assert_close(_norms(rows), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)
    # bf16 towers, but an fp32 normalisation: the values are not multiples of bf16's step.
    assert not torch.equal(image, image.bfloat16().float())


def test_float64_stays_float64() -> None:
    model = tiny_model(init_logit_bias=-10).double()
    outputs = outputs_of(model, some_images(4))
    assert [output.dtype for output in outputs.values()] == [torch.float64] * 4
    torch.testing.assert_close(_norms(outputs["image"]), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_scale_is_limited_and_bias_returned() -> None:
    model = tiny_model(init_logit_bias=-10)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(500))
    outputs = outputs_of(model, some_images(4))
    assert outputs["logit_scale"].item() == pytest.approx(100)
    assert outputs["logit_bias"].tolist() == [-10]


def test_outputs_are_made_as_they_are_asked_for_and_a_samples_text_is_its_first_caption() -> None:
    model = tiny_model()
    owners = torch.tensor([0, 0, 1, 2])
    tokens = model.tokenizer(TEXTS)
    inputs = {
        "image": Images(some_images(3)),
        "text": Texts(*model.tokenizer([TEXTS[0], TEXTS[2], TEXTS[3]])),
        "captions": Texts(*tokens, owners=owners),
    }
    assert set(model(inputs, frozenset({"text"}))) == {"text", "logit_scale"}
    assert set(model(inputs, frozenset({"image", "regions"}))) == {"image", "logit_scale"}
    outputs = model(inputs, frozenset({"image", "text", "captions"}))
    expected = model.encode_text(*tokens)
    torch.testing.assert_close(outputs["captions"], expected)
    torch.testing.assert_close(outputs["text"], expected[[0, 2, 3]])
    more = model(
        {**inputs, "counterfactual": Texts(*model.tokenizer(TEXTS[:1]))}, frozenset({"text", "counterfactual"})
    )
    torch.testing.assert_close(more["counterfactual"], expected[:1])
    torch.testing.assert_close(more["text"], expected[[0, 2, 3]])


TOWERS: dict[str, dict[str, Any]] = {
    "vit": {**VIT, "ls_init_value": 0.1},
    "convnext": {
        "timm_model_name": "test_convnext",
        "timm_model_pretrained": False,
        "timm_proj": "linear",
        "timm_pool": "",
    },
}


@torch.no_grad()
def test_convolutions_find_their_channels_last_and_compute_what_they_did() -> None:
    model = tiny_model(architecture=architecture({**TOWERS["convnext"], "image_size": 32})).double().eval()
    seen: list[torch.Tensor] = []
    first = next(module for module in model.image.modules() if isinstance(module, nn.Conv2d))
    hook = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = some_images(3, 32)
    found = model.image(images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    hook.remove()
    pixels = normalised(images.double(), model)
    torch.testing.assert_close(found, model.image.trunk(pixels), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", TOWERS)
def test_no_decay_on_norms_biases_scale_and_bias(kind: str) -> None:
    model = tiny_model(architecture=architecture(TOWERS[kind]), init_logit_bias=-10)
    names = no_weight_decay_names(model)
    parameters = dict(model.named_parameters())
    assert names <= set(parameters)
    assert {"logit_scale", "logit_bias"} <= names
    assert {name for name, parameter in parameters.items() if parameter.ndim == 1} <= names
    norms = [
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm)
        for name, _ in module.named_parameters()
    ]
    assert set(norms) <= names
    decayed = set(parameters) - names
    weights = [
        f"{prefix}.weight"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
    ]
    assert len(weights) > 5
    assert set(weights) | {"text.positional_embedding", "text.text_projection"} <= decayed


def test_norms_of_several_dimensions_are_kept_from_decay() -> None:
    model = nn.Sequential(nn.LayerNorm([3, 4, 4]), nn.Linear(4, 4))
    assert no_weight_decay_names(model) == {"0.weight", "0.bias", "1.bias"}


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
        {"timm_model_name": "test_resnet", "timm_model_pretrained": False, "timm_pool": "avg", "image_size": 64},
    ],
)
def test_frozen_batch_norm_never_changes(vision: dict[str, Any]) -> None:
    model = tiny_model(architecture=architecture(vision), freeze_batch_norm=True)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) > 4
    images = some_images(4, 64)
    together = outputs_of(model, images)["image"]
    together.sum().backward()
    alone = torch.cat([model.encode_image(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
