"""The weights of one tower from a file: it computes what they compute at home; others are refused by name."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from tests.launch.saved import save_checkpoint
from tests.vlm.model.hugging_face import save_text_model, save_vision_model, save_whole
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, perturb, some_images, tiny_model
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.open_clip_names import to_open_clip

DIM = 24


def built(image: dict[str, Any], text: dict[str, Any] | None = None, dim: int = DIM, **fields: Any) -> DualEncoder:
    towers = {"embed_dim": dim, "image": image, "text": text or {"text_cfg": TEXT}}
    return build_model(ModelConfig.model_validate({"towers": towers, **fields})).eval()


def moved_model() -> DualEncoder:
    """A model whose weights are nobody's first ones."""
    model = tiny_model(seed=7)
    perturb(model)
    return model.eval()


def plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


@pytest.mark.parametrize(("name", "suffix"), [("test_efficientnet", "safetensors"), ("test_convnext", "pth")])
@torch.no_grad()
def test_features_of_a_timm_model_are_timms_own(tmp_path: Path, name: str, suffix: str) -> None:
    theirs = timm.create_model(name)
    perturb(theirs)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()}}, path)
    else:
        save_file(plain(theirs.state_dict()), path)
    model = built({"timm": name, "weights": str(path)}, lock={"image": "all"}, image_size=64)
    stated = timm.get_pretrained_cfg(name)
    assert model.image_spec.mean == tuple(stated.mean)
    assert model.image_spec.interpolation == stated.interpolation
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (stated.mean, stated.std))
    pixels = (some_images(3, 64) / 255 - mean) / std
    theirs.reset_classifier(0)
    features = theirs.eval()(pixels)
    torch.testing.assert_close(model.image.trunk.get_submodule("trunk")(pixels), features, rtol=0, atol=1e-5)
    projection = model.image.trunk.get_parameter("head.proj.weight")
    torch.testing.assert_close(model.image(some_images(3, 64)), features @ projection.T, rtol=0, atol=1e-5)
    (notice,) = model.notices
    told, _, names = notice.partition(": left out, for the tower has no such part: ")
    assert told == f"towers.image.weights {path}"
    assert set(names.split(", ")) == {f"{stated.classifier}.weight", f"{stated.classifier}.bias"}


def test_the_tower_of_a_named_model_with_its_projection_from_a_file_of_a_whole_one(tmp_path: Path) -> None:
    source = moved_model()
    save_file(to_open_clip(source), tmp_path / "whole.safetensors")
    fields = {"embed_dim": DIM, "vision_cfg": VIT, "text_cfg": TEXT}
    (tmp_path / "vlm-tiny-tower.json").write_text(json.dumps(fields))
    open_clip.add_model_config(tmp_path / "vlm-tiny-tower.json")
    named = {"open_clip": "vlm-tiny-tower", "weights": str(tmp_path / "whole.safetensors")}
    model = built(named, named)
    assert torch.equal(model.encode_image(some_images()), source.encode_image(some_images()))
    assert torch.equal(model.encode_text(*model.tokenizer(TEXTS)), source.encode_text(*source.tokenizer(TEXTS)))
    again = build_model(ModelConfig.model_validate_json(model.config.model_dump_json()))
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_projection_of_another_width_is_left_out_for_a_new_one(tmp_path: Path) -> None:
    source = moved_model()
    save_file(to_open_clip(source), tmp_path / "whole.safetensors")
    model = built({"vision_cfg": VIT, "weights": str(tmp_path / "whole.safetensors")}, dim=16)
    fresh = built({"vision_cfg": VIT}, dim=16)
    trunk, fresh_trunk, source_trunk = (one.image.trunk for one in (model, fresh, source))
    assert torch.equal(trunk.get_parameter("proj"), fresh_trunk.get_parameter("proj"))
    assert torch.equal(trunk.get_parameter("conv1.weight"), source_trunk.get_parameter("conv1.weight"))
    (notice,) = model.notices
    assert "left out" in notice
    assert built({"vision_cfg": VIT}).notices == ()


@torch.no_grad()
def test_a_transformers_model_reads_a_folder_or_a_file(tmp_path: Path) -> None:
    """The library's own reading of the other folder, pooled, is what both make."""
    for part, save in (("image", save_vision_model), ("text", save_text_model)):
        for place in ("first", "other"):
            save(tmp_path / place / part)
        path = tmp_path / "other" / part / "model.safetensors"
        moved = {name: tensor + 0.25 * torch.randn_like(tensor) for name, tensor in load_file(path).items()}
        moved |= {"classifier.weight": torch.ones(3, 32)}
        save_file(moved, path, {"format": "pt"})
        torch.save(moved, tmp_path / f"{part}.pt")
        save_file(moved, tmp_path / f"{part}.safetensors")
    home = {part: AutoModel.from_pretrained(tmp_path / "other" / part).eval() for part in ("image", "text")}
    for place in ("other/{}", "{}.safetensors", "{}.pt"):
        image, text = (str(tmp_path / place.format(part)) for part in ("image", "text"))
        model = built(
            {"transformers": str(tmp_path / "first" / "image"), "pool": "first", "weights": image},
            {"transformers": str(tmp_path / "first" / "text"), "context_length": 16, "weights": text},
        )
        for part, tower in (("image", model.image.trunk), ("text", model.text)):
            expected = home[part].state_dict()
            weights = tower.get_submodule("model").state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
        assert model.notices == tuple(
            f"towers.{part}.weights {path}: left out, for the tower has no such part: classifier.weight"
            for part, path in (("image", image), ("text", text))
        )


@pytest.mark.parametrize(
    ("kind", "weights", "words"),
    [
        ("vit", {}, r"^towers\.image\.weights .*other\.safetensors: its files hold no weights for "),
        ("vit", None, r"^towers\.image\.weights .*other\.safetensors: no such file or folder$"),
        ("clip", {}, r"^towers\.image\.weights .*: one half of a CLIP or SigLIP is read from a folder with its config"),
    ],
)
def test_files_without_a_transformers_model_are_refused(
    tmp_path: Path, kind: str, weights: dict[str, Tensor] | None, words: str
) -> None:
    if kind == "vit":
        save_vision_model(tmp_path)
    else:
        save_whole(tmp_path, "clip")
    path = tmp_path / "other.safetensors"
    if weights is not None:
        save_file({"nothing": torch.ones(1)}, path)
    pool = {"pool": "first"} if kind == "vit" else {}
    with pytest.raises(UserError, match=words):
        built({"transformers": str(tmp_path), "weights": str(path), **pool})


def test_a_tower_out_of_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    source = moved_model()
    folder = save_checkpoint(tmp_path, source)
    model = built({"vision_cfg": VIT, "weights": str(folder)})
    assert torch.equal(model.encode_image(some_images()), source.encode_image(some_images()))


def test_a_transformers_tower_out_of_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    save_vision_model(tmp_path / "vit")
    kind = {"transformers": str(tmp_path / "vit"), "pool": "first"}
    source = built(kind)
    perturb(source)
    model = built({**kind, "weights": str(save_checkpoint(tmp_path, source))})
    assert torch.equal(model.encode_image(some_images()), source.encode_image(some_images()))


def without(name: str) -> Any:
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("visual.conv1.weight"), r"of another network: conv1\.weight is missing$"),
        (
            lambda weights: {**weights, "visual.ln_pre.bias": torch.zeros(5)},
            r"of another network: ln_pre\.bias is \[5\] but the model has \[32\]$",
        ),
        (
            lambda weights: {**weights, "visual.transformer.resblocks.2.ln_1.bias": torch.zeros(32)},
            r"of another network: transformer\.resblocks\.2\.ln_1\.bias is not in the model$",
        ),
        (lambda weights: {"a": torch.ones(2)}, r"class_embedding is missing; .* is missing; .* is missing$"),
        (
            lambda weights: {**weights, "visual.conv1.weight": weights["visual.conv1.weight"].to(torch.int8)},
            r"visual\.conv1\.weight holds torch\.int8$",
        ),
        (lambda weights: {"visual.proj": torch.full((2,), torch.nan)}, r"'visual.proj' holds what is no finite number"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "whole.safetensors"
    save_file(change(to_open_clip(moved_model())), path)
    with pytest.raises(UserError, match=words) as caught:
        built({"vision_cfg": VIT, "weights": str(path)})
    assert str(caught.value).startswith(f"towers.image.weights {path}: ")
    assert "\n" not in str(caught.value)


def test_no_weights_and_no_plain_tensors(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^towers\.text\.weights missing\.pt: no such file, and no folder with weights"
    ):
        built({"vision_cfg": VIT}, {"text_cfg": TEXT, "weights": "missing.pt"})
    torch.save({"weights": Path}, tmp_path / "pickle.pt")
    with pytest.raises(UserError, match=r"pickle\.pt: neither safetensors nor a torch file of plain tensors"):
        built({"vision_cfg": VIT, "weights": str(tmp_path / "pickle.pt")})
