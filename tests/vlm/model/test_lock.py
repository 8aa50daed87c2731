"""A locked tower: its last blocks and its projection train; the rest computes as in evaluation, without a graph."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.vlm.model.hugging_face import save_text_model, save_vision_model
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, some_images
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.image_spec import ImageSpec
from vlm.model.towers import ImageTower
from vlm.training.optimizers.adamw import AdamW
from vlm.training.optimizers.maker import OptimizerMaker

LITE0 = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
SCALE = {"logit_scale"}


def built(image: dict[str, Any], text: dict[str, Any], **fields: Any) -> DualEncoder:
    towers = {"embed_dim": 24, "image": image, "text": text}
    return build_model(ModelConfig.model_validate({"towers": towers, **fields}))


def transformers_towers(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    save_vision_model(folder / "image", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    save_text_model(folder / "text")
    image = {"transformers": str(folder / "image"), "pool": "first"}
    return image, {"transformers": str(folder / "text"), "context_length": 16}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("vision", "lock", "expected"),
    [
        (VIT, "all", ("trunk.proj",)),
        (VIT, {"all_but": 1}, ("trunk.proj", "trunk.transformer.resblocks.1.")),
        (VIT, {"all_but": 2}, ("trunk.proj", "trunk.transformer.resblocks.")),
        (LITE0, "all", ("trunk.head.proj.weight",)),
        (LITE0, {"all_but": 2}, ("trunk.head.proj.weight", "trunk.trunk.blocks.6.0.", "trunk.trunk.blocks.5.3.")),
        ({**LITE0, "timm_proj": ""}, "all", ("trunk.trunk.classifier.",)),
        ({**LITE0, "timm_proj": "none", "timm_model_name": "resnet18"}, "all", ()),
        ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, "all", ("trunk.attnpool.c_proj.",)),
    ],
)
def test_what_trains_of_a_locked_image_tower(vision: dict[str, Any], lock: Any, expected: tuple[str, ...]) -> None:
    dim = {"embed_dim": 512} if vision.get("timm_proj") == "none" else {}
    fields = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, **dim}
    config = {"architecture": fields, "lock": {"image": lock}, "freeze_batch_norm": lock != "all"}
    model = build_model(ModelConfig.model_validate(config))
    every = {name for name, _ in model.image.named_parameters()}
    assert trained(model.image) == {name for name in every if name.startswith(expected)} == trained(model.image) & every
    assert all(any(name.startswith(start) for name in trained(model.image)) for start in expected)
    assert trained(model) - {f"image.{name}" for name in every} >= SCALE | {"text.token_embedding.weight"}
    again = build_model(ModelConfig.model_validate_json(model.config.model_dump_json()))
    assert trained(again) == trained(model)


def test_what_trains_of_locked_text_towers(tmp_path: Path) -> None:
    image, text = transformers_towers(tmp_path)
    heads = {"image_head": {"kind": "linear"}, "text_head": {"kind": "linear"}}
    whole = built(image, text, lock={"image": "all", "text": "all"}, **heads)
    projections = {"image.trunk.projection.weight", "text.projection.weight"}
    assert trained(whole) == SCALE | projections | {"image_head.weight", "text_head.weight"}
    causal = built(image, {"text_cfg": TEXT}, lock={"text": {"all_but": 1}}).text
    assert {name.partition(".resblocks.")[2][:2] for name in trained(causal)} == {"", "1."}
    assert {name for name in trained(causal) if "resblocks" not in name} == {"text_projection"}
    padded = built(image, {"text_cfg": {**TEXT, "embed_cls": True}}, lock={"text": "all"}).text
    assert trained(padded) == {"tower.text_projection"}


def saved_sizes(forward: Any) -> list[int]:
    """The sizes of what autograd keeps of a forward for its backward, but for parameters."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sizes


def test_the_forward_of_a_tower_locked_whole_makes_no_graph(tmp_path: Path) -> None:
    image, text = transformers_towers(tmp_path)
    whole = built(image, text, lock={"image": "all", "text": "all"})
    rows, width = 3, 32  # the one thing that is kept: the features before the projection
    assert saved_sizes(lambda: whole.image(some_images(rows))) == [rows * width]
    assert saved_sizes(lambda: whole.text(*whole.tokenizer(TEXTS))) == [len(TEXTS) * width]
    free = built(image, text)
    assert sum(saved_sizes(lambda: free.image(some_images(rows)))) > 100 * rows * width


def test_what_is_locked_has_no_dropout_whatever_mode_the_model_is_in(tmp_path: Path) -> None:
    image, text = transformers_towers(tmp_path)
    pictures = some_images()
    free, locked, partly = (built(image, text, lock={"image": lock}).train() for lock in (None, "all", {"all_but": 1}))
    assert not torch.equal(free.image(pictures), free.image(pictures))
    assert torch.equal(locked.image(pictures), locked.image(pictures))
    assert torch.equal(locked.image(pictures), locked.eval().image(pictures))
    first, last = partly.image.blocks()
    modes = [{module.training for module in block.modules()} for block in (first, last)]
    assert modes == [{False}, {True}]
    assert not {module.training for block in partly.eval().image.blocks() for module in block.modules()} & {True}


def test_moving_statistics_of_what_is_locked_stand_still() -> None:
    norm = nn.BatchNorm1d(8)
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), norm)
    tower = ImageTower(trunk, ImageSpec(size=8)).train()
    pictures = some_images(5, 4)
    tower(pictures)
    assert norm.running_mean is not None
    moved = norm.running_mean.clone()
    assert moved.norm() > 0
    tower.lock()
    tower.train()(pictures)
    assert torch.equal(norm.running_mean, moved)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("lock", "words"),
    [
        ({"image": {"all_but": 3}}, r"^model\.lock\.image\.all_but: found 3; the tower has 2 blocks$"),
        ({"text": {"all_but": 9}}, r"^model\.lock\.text\.all_but: found 9; the tower has 2 blocks$"),
    ],
)
def test_more_blocks_than_there_are(lock: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        built({"vision_cfg": VIT}, {"text_cfg": TEXT}, lock=lock)


def test_a_model_of_which_nothing_trains_is_refused() -> None:
    module = nn.Linear(2, 2)
    module.requires_grad_(False)
    with pytest.raises(UserError, match=r"^model\.lock: nothing is left to train"):
        OptimizerMaker(AdamW(), {})(module)
