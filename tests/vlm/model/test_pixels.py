"""Pixels are normalised, by a pass of its own or by the patch embedding."""

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from torch import nn

from vlm.model.image_spec import ImageSpec
from vlm.model.pixels import CentredPixels, Normalisation, PatchEmbedding, pixels_for

SPEC = ImageSpec(size=32)
MEAN, STD = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (SPEC.mean, SPEC.std))
IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def open_clip_vit() -> tuple[nn.Module, str]:
    trunk = open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=1, heads=2, mlp_ratio=2.0, output_dim=16
    )
    return trunk, "conv1"


def timm_vit() -> tuple[nn.Module, str]:
    trunk = TimmModel("test_vit", 16, image_size=32, pool="avg", proj="linear", pretrained=False)
    return trunk, "trunk.patch_embed.proj"


def test_one_pass_gives_the_usual_values() -> None:
    expected = (IMAGES.double() / 255 - MEAN) / STD
    torch.testing.assert_close(Normalisation(SPEC.mean, SPEC.std)(IMAGES).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [open_clip_vit, timm_vit])
def test_a_patch_embedding_normalises_by_itself(make) -> None:  # type: ignore[no-untyped-def]
    trunk, place = make()
    plain = trunk.get_submodule(place).double()
    weight = plain.weight.detach().clone().requires_grad_()
    bias = None if plain.bias is None else plain.bias.detach().clone().requires_grad_()
    expected = nn.functional.conv2d((IMAGES.double() / 255 - MEAN) / STD, weight, bias, plain.stride)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (expected * direction).sum().backward()
    names = set(trunk.state_dict())

    pixels = pixels_for(trunk, SPEC.mean, SPEC.std).double()
    folded = trunk.get_submodule(place).double()
    assert isinstance(folded, PatchEmbedding)
    assert set(trunk.state_dict()) == names
    made = folded(pixels(IMAGES))
    (made * direction).sum().backward()
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)  # factors are rounded to fp32
    torch.testing.assert_close(folded.weight.grad, weight.grad, rtol=1e-6, atol=1e-5)
    if bias is not None:
        assert folded.bias is not None
        torch.testing.assert_close(folded.bias.grad, bias.grad, rtol=1e-12, atol=1e-12)


def test_centred_pixels_are_exact_in_bf16() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        pixels = CentredPixels()(every)
    assert pixels.dtype == torch.bfloat16
    assert pixels[0, 0].flatten().tolist() == list(range(-128, 128))


def test_networks_that_pad_or_look_elsewhere_get_normalised_pixels() -> None:
    resnet = open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 16, 2, image_size=32, width=8)
    assert isinstance(pixels_for(resnet, SPEC.mean, SPEC.std), Normalisation)
    trunk, _ = open_clip_vit()
    trunk.conv1 = nn.Conv2d(3, 32, 8, 8, padding=2, bias=False)
    assert isinstance(pixels_for(trunk, SPEC.mean, SPEC.std), Normalisation)
