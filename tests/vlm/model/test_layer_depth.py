"""The rate's decay by layers: factors as BEiT's code and timm have them, and for every kind of tower by its graph."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from tests.vlm.model.hugging_face import save_text_model, save_vision_model
from tests.vlm.model.test_blocks import RESNET, built
from tests.vlm.model.tiny import TEXT, VIT
from vlm.errors import EveryRankError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.layer_depth import factors_by_depth

DECAY = 0.75


def beit_layer(name: str, num_layers: int) -> int:
    """`get_num_layer_for_vit` of BEiT's code: 0 before the blocks, i + 1 in block i, the last behind them."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else num_layers - 1


def test_factors_of_timms_vit_are_those_of_beit_and_timm() -> None:
    name = "vit_tiny_patch16_224"
    fields = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
    model = built({"vision_cfg": fields}, {"text_cfg": TEXT})
    factors = factors_by_depth(model, "image", DECAY)
    prefix = "image.trunk.trunk."
    trunk = {
        name.removeprefix(prefix): factors.get(name, 1.0) for name, _ in model.named_parameters() if prefix in name
    }
    num_layers = 12 + 2
    assert trunk == pytest.approx(
        {name: DECAY ** (num_layers - 1 - beit_layer(name, num_layers)) for name in trunk}, rel=1e-12
    )
    classifier = timm.create_model(name, num_classes=3)
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    by_timm = {
        names[parameter]: group["lr_scale"]
        for group in param_groups_layer_decay(classifier, layer_decay=DECAY)
        for parameter in group["params"]
    }
    # timm counts the last norm to the last block, BEiT to what is behind it.
    shared = {name for name in trunk if name in by_timm and not name.startswith(("norm.", "fc_norm."))}
    assert len(shared) == 4 + 12 * 12
    assert {name: trunk[name] for name in shared} == pytest.approx({name: by_timm[name] for name in shared}, rel=1e-12)


def layers(model: Any, part: str, prefix: str = "") -> dict[str, float]:
    """How many layers each parameter of a tower is below what follows the blocks; 0 for what does."""
    factors = factors_by_depth(model, part, 0.5)  # type: ignore[arg-type]
    names = [name for name, _ in getattr(model, part).named_parameters(part)]
    return {
        name.removeprefix(f"{part}.{prefix}"): -float(torch.tensor(factors.get(name, 1.0)).log2()) for name in names
    }


def assert_layers(found: dict[str, float], expected: dict[str, int]) -> None:
    """Of names that begin with one of `expected`, the longest: its layer; 0 for all others."""
    for name, layer in found.items():
        match = max((start for start in expected if name.startswith(start)), key=len, default=None)
        assert layer == (0 if match is None else expected[match]), name
    assert all(any(name.startswith(start) for name in found) for start in expected)


def test_layers_of_open_clips_towers() -> None:
    model = built({"vision_cfg": VIT}, {"text_cfg": TEXT})
    model.train()
    blocks = {"transformer.resblocks.0": 2, "transformer.resblocks.1": 1}
    before = {"conv1": 3, "class_embedding": 3, "positional_embedding": 3, "ln_pre": 3}
    assert_layers(layers(model, "image", "trunk."), before | blocks)
    assert_layers(layers(model, "text"), {"token_embedding": 3, "positional_embedding": 3} | blocks)
    assert model.image.training
    assert model.text.training


def test_layers_of_a_resnet_and_of_what_stands_between_blocks() -> None:
    model = built({"vision_cfg": RESNET}, {"text_cfg": {**TEXT, "embed_cls": True}})
    stages = {"layer1.0": 5, "layer2.0": 4, "layer2.1": 3, "layer3.0": 2, "layer4.0": 1}
    stem = dict.fromkeys(("conv1", "conv2", "conv3", "bn1", "bn2", "bn3"), 6)
    found = layers(model, "image", "trunk.")
    assert_layers(found, stages | {name: 6 for name in stem if any(one.startswith(name) for one in found)})
    fields = {"timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "linear", "image_size": 64}
    convnext = built({"vision_cfg": fields}, {"text_cfg": TEXT})
    first = {0: 12, 1: 10, 2: 8, 3: 2}  # layer of the first block of each stage of 2, 2, 6 and 2
    places = [(stage, n) for stage, num in enumerate((2, 2, 6, 2)) for n in range(num)]
    expected = {f"stages.{stage}.blocks.{n}": first[stage] - n for stage, n in places}
    expected |= {f"stages.{stage}.downsample": first[stage] for stage in (1, 2, 3)} | {"stem": 13}
    assert_layers(layers(convnext, "image", "trunk.trunk."), expected)


def test_layers_of_transformers_models_and_of_towers_side_by_side(tmp_path: Path) -> None:
    save_vision_model(tmp_path / "image")
    save_text_model(tmp_path / "text", "bert")
    image = {"transformers": str(tmp_path / "image"), "pool": "first"}
    text = {"transformers": str(tmp_path / "text"), "context_length": 16}
    model = built(image, text)
    found = layers(model, "text", "model.")
    assert_layers(found, {"embeddings": 3, "encoder.layer.0": 2, "encoder.layer.1": 1})
    assert set(layers(model, "image").values()) == {0, 1, 2, 3}


def test_a_locked_tower_decays_what_is_left_of_it() -> None:
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": TEXT}}
    model = build_model(ModelConfig.model_validate({"towers": towers, "lock": {"image": {"all_but": 1}}}))
    found = layers(model, "image", "trunk.")
    assert {name for name, layer in found.items() if layer == 1} == {
        name for name in found if name.startswith("transformer.resblocks.1")
    }


def test_a_tower_without_blocks_is_refused() -> None:
    text: dict[str, Any] = {"tests.vlm.model.own_towers:OwnText": {}}
    model = built({"vision_cfg": VIT}, text)
    line = r"^optimizer.lr_decay.text: found 0.75; the text tower \(Bag\) repeats no blocks by which to decay; lr_scale"
    with pytest.raises(EveryRankError, match=line):
        factors_by_depth(model, "text", DECAY)


def test_towers_side_by_side_are_counted_each_by_itself() -> None:
    deep = {**VIT, "layers": 3}
    images = [{"embed_dim": 12, "tower": {"vision_cfg": fields}} for fields in (VIT, deep)]
    texts = [{"embed_dim": 12, "tower": {"text_cfg": TEXT}}] * 2
    model = built({"joined": {"members": images}}, {"joined": {"members": texts}})
    found = layers(model, "image", "trunk.members.")
    blocks = {f"{m}.network.transformer.resblocks.{n}": num - n for m, num in ((0, 2), (1, 3)) for n in range(num)}
    before = {
        f"{m}.network.{name}": num + 1 for m, num in ((0, 2), (1, 3)) for name in ("conv1", "class_", "posi", "ln_pre")
    }
    assert_layers(found, before | blocks)
    assert layers(model, "text", "members.1.network.")["token_embedding.weight"] == 3
