"""The repeated blocks of each kind of tower: these modules, in the order in which a forward runs them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.vlm.model.hugging_face import save_text_model, save_vision_model, save_whole
from tests.vlm.model.tiny import TEXT, VIT
from vlm.model.blocks import repeated_blocks
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder

RESNET = {"image_size": 32, "layers": [1, 2, 1, 1], "width": 8, "head_width": 16}


def numbered(pattern: str, count: int) -> list[str]:
    return [pattern.format(number) for number in range(count)]


def names_of(blocks: Sequence[nn.Module], network: nn.Module) -> list[str]:
    names = {module: name for name, module in network.named_modules()}
    return [names[block] for block in blocks]


def order_of(blocks: Sequence[nn.Module], forward: Any) -> list[nn.Module]:
    """The blocks as a forward runs them."""
    seen: list[nn.Module] = []
    hooks = [block.register_forward_hook(lambda module, *_: seen.append(module)) for block in blocks]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return seen


def built(image: dict[str, Any], text: dict[str, Any]) -> DualEncoder:
    towers = {"embed_dim": 24, "image": image, "text": text}
    return build_model(ModelConfig.model_validate({"towers": towers, "freeze_batch_norm": True})).eval()


def test_blocks_of_open_clips_own_towers() -> None:
    layers = ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]
    kinds: list[tuple[dict[str, Any], list[str], dict[str, Any], str]] = [
        (VIT, numbered("transformer.resblocks.{}", 2), TEXT, "transformer.resblocks.{}"),
        (RESNET, layers, {**TEXT, "embed_cls": True}, "tower.transformer.resblocks.{}"),
    ]
    for vision, expected, text, pattern in kinds:
        model = built({"vision_cfg": vision}, {"text_cfg": text})
        assert names_of(model.image.blocks(), model.image.trunk) == expected
        assert names_of(model.text.blocks(), model.text) == numbered(pattern, 2)
        images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        assert order_of(model.image.blocks(), lambda m=model, x=images: m.image(x)) == list(model.image.blocks())
        assert order_of(model.text.blocks(), lambda m=model: m.text(*m.tokenizer(["a"]))) == list(model.text.blocks())


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("tf_efficientnet_lite0", {f"trunk.blocks.{n}": count for n, count in enumerate((1, 2, 2, 3, 3, 4, 1))}),
        ("resnet18", {f"trunk.layer{n}": 2 for n in (1, 2, 3, 4)}),
        ("convnext_atto", {f"trunk.stages.{n}.blocks": count for n, count in enumerate((2, 2, 6, 2))}),
        ("vit_tiny_patch16_224", {"trunk.blocks": 12}),
    ],
)
def test_blocks_of_timms_models(name: str, stages: dict[str, int]) -> None:
    fields = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
    trunk = built({"vision_cfg": fields}, {"text_cfg": TEXT}).image.trunk
    blocks = repeated_blocks(trunk)
    assert names_of(blocks, trunk) == [f"{stage}.{n}" for stage, count in stages.items() for n in range(count)]
    assert order_of(blocks, lambda: trunk(torch.zeros(1, 3, 224, 224))) == list(blocks)
    assert timm.is_model(name)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("bert", "model.encoder.layer.{}"), ("distilbert", "model.transformer.layer.{}"), ("gpt2", "model.h.{}")],
)
def test_blocks_of_transformers_models(tmp_path: Path, kind: str, pattern: str) -> None:
    save_vision_model(tmp_path / "image")
    save_text_model(tmp_path / "text", kind)
    text = {"transformers": str(tmp_path / "text"), "context_length": 16}
    model = built({"transformers": str(tmp_path / "image"), "pool": "first"}, text)
    assert names_of(model.text.blocks(), model.text) == numbered(pattern, 2)
    (first, second) = names_of(model.image.blocks(), model.image.trunk)
    assert first.removesuffix("0") == second.removesuffix("1")
    assert all(type(block).__name__ == "ViTLayer" for block in model.image.blocks())


def test_blocks_of_a_whole_clip(tmp_path: Path) -> None:
    save_whole(tmp_path / "clip", "clip")
    model = build_model(ModelConfig(transformers=str(tmp_path / "clip")))
    for tower in (model.image, model.text):
        assert [type(block).__name__ for block in tower.blocks()] == ["CLIPEncoderLayer"] * 2
        assert names_of(tower.blocks(), tower)[1].endswith(".layers.1")


class Odd(nn.Module):
    """Says itself what its blocks are."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(2, 2), nn.Linear(2, 2)

    def blocks(self) -> list[nn.Module]:
        return [self.first, self.last]


def test_blocks_of_ones_own_network() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8)
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    assert names_of(repeated_blocks(network), network) == numbered("2.layers.{}", 3)
    odd = Odd()
    assert list(repeated_blocks(odd)) == [odd.first, odd.last]
    assert not repeated_blocks(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
