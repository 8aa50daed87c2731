"""Weights come in from open_clip's files of either layout, and from nothing that could run code."""

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.vlm.model.tiny import TEXTS, architecture, perturb, some_images, tiny_model
from vlm.checkpoint.manifest import Manifest
from vlm.checkpoint.writer import write_checkpoint
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.dual_encoder import DualEncoder
from vlm.model.exchange import export_open_clip
from vlm.model.open_clip_names import to_open_clip
from vlm.model.weights_file import read_weights

SIGLIP = {"no_causal_mask": True, "pool_type": "last"}


def _open_clip_model(kind: type[torch.nn.Module], fields: dict[str, Any]) -> Any:
    torch.manual_seed(2)
    model = kind(**{name: value for name, value in fields.items() if name != "custom_text"})
    perturb(model)
    return model.eval()


def _save(weights: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)
    return str(path)


def _assert_same(model: DualEncoder, theirs: torch.nn.Module) -> None:
    model.eval()
    images, spec = some_images(), model.image_spec
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS, context_length=model.text.context_length)
    image, text, scale = theirs((images / 255 - mean) / std, tokens)[:3]
    torch.testing.assert_close(model.encode_image(images), image, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode_text(*model.tokenizer(TEXTS)), text, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.logit_scale.exp()[0], scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize(
    ("kind", "text"), [(open_clip.CLIP, {}), (open_clip.CustomTextCLIP, {}), (open_clip.CustomTextCLIP, SIGLIP)]
)
def test_weights_of_both_layouts_load(
    tmp_path: Path, file: str, kind: type[torch.nn.Module], text: dict[str, Any]
) -> None:
    theirs = _open_clip_model(kind, architecture(text=text))
    path = _save(theirs.state_dict(), tmp_path / file)
    model = tiny_model(architecture=architecture(text=text), pretrained=path)
    assert model.logit_scale.shape == (1,)
    _assert_same(model, theirs)


def test_a_caption_decoder_is_left_out(tmp_path: Path) -> None:
    fields = architecture(
        {**_VISION, "attentional_pool": True, "output_tokens": True}, {"embed_cls": True, "output_tokens": True}
    )
    decoder = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    theirs = _open_clip_model(open_clip.CoCa, {**fields, "multimodal_cfg": decoder})
    torch.nn.init.normal_(theirs.text_decoder.text_projection)  # open_clip leaves in it whatever the memory held
    path = _save(theirs.state_dict(), tmp_path / "coca.safetensors")
    described = {**fields, "multimodal_cfg": decoder, "custom_text": True}
    model = tiny_model(architecture=described, captioner="none", pretrained=path).eval()
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS, context_length=16)
    torch.testing.assert_close(
        model.encode_text(*model.tokenizer(TEXTS)), theirs.encode_text(tokens), rtol=0, atol=1e-6
    )


_VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "attn_pooler_heads": 2}


def test_batch_norm_weights_load_into_a_frozen_tower(tmp_path: Path) -> None:
    fields = architecture({"layers": [1, 1, 1, 1], "width": 8, "image_size": 32})
    theirs = _open_clip_model(open_clip.CLIP, fields).train()
    theirs.encode_image(torch.randn(4, 3, 32, 32))  # running statistics of their own
    path = _save(theirs.eval().state_dict(), tmp_path / "weights.safetensors")
    _assert_same(tiny_model(architecture=fields, freeze_batch_norm=True, pretrained=path), theirs)


def test_position_embeddings_are_resized_as_open_clip_resizes_them(tmp_path: Path) -> None:
    path = _save(_open_clip_model(open_clip.CLIP, architecture()).state_dict(), tmp_path / "weights.safetensors")
    larger = architecture({**_VISION, "image_size": 48}, {"context_length": 20})
    theirs = open_clip.CLIP(**larger)
    open_clip.factory.load_checkpoint(theirs, path)
    model = tiny_model(architecture=larger, pretrained=path)
    torch.testing.assert_close(
        model.image.trunk.positional_embedding, theirs.visual.positional_embedding, rtol=0, atol=0
    )
    torch.testing.assert_close(model.text.positional_embedding, theirs.positional_embedding, rtol=0, atol=0)


def test_a_bias_that_the_weights_lack_keeps_its_initial_value(tmp_path: Path) -> None:
    path = _save(_open_clip_model(open_clip.CLIP, architecture()).state_dict(), tmp_path / "weights.safetensors")
    model = tiny_model(pretrained=path, init_logit_bias=-10)
    assert model.logit_bias is not None
    assert model.logit_bias.tolist() == [-10]


def test_weights_of_another_architecture_name_the_first_differing_tensors(tmp_path: Path) -> None:
    path = _save(_open_clip_model(open_clip.CLIP, architecture()).state_dict(), tmp_path / "weights.safetensors")
    wider = architecture({**_VISION, "width": 48})
    with pytest.raises(UserError, match=r"another architecture: .*is \[32\] but the model has \[48\]"):
        tiny_model(architecture=wider, pretrained=path)
    deeper = architecture({**_VISION, "layers": 3})
    with pytest.raises(UserError, match=r"image\.trunk\.transformer\.resblocks\.2\.\S+ is missing"):
        tiny_model(architecture=deeper, pretrained=path)
    shallower = architecture(text={"layers": 1})
    with pytest.raises(UserError, match=r"text\.transformer\.resblocks\.1\.\S+ is not in the model"):
        tiny_model(architecture=shallower, pretrained=path)


class _Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_of_training_wrappers_are_taken_off(tmp_path: Path, wrapped: str, suffix: str) -> None:
    model = tiny_model(seed=4)
    weights = {wrapped.format(name): tensor for name, tensor in to_open_clip(model).items()}
    inner = {name.replace("resblocks.0.", "resblocks.0._orig_mod."): tensor for name, tensor in weights.items()}
    path = tmp_path / f"weights{suffix}"
    save_file(inner, path) if suffix == ".safetensors" else torch.save({"state_dict": inner}, path)
    again = tiny_model(seed=5, pretrained=str(path))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_under_two_names_are_refused(tmp_path: Path) -> None:
    weights = to_open_clip(tiny_model())
    twice = {**weights, **{f"module.{name}": tensor + 1 for name, tensor in weights.items()}}
    save_file(twice, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="the same weights more than once"):
        tiny_model(pretrained=str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize("name", ["", "open_clip_model.safetensors"])
def test_an_open_clip_folder_brings_its_preprocessing_and_activation(tmp_path: Path, name: str) -> None:
    described: dict[str, Any] = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resize_mode": "squash"}
    model = tiny_model(**described, interpolation="bilinear", quick_gelu=True)
    export_open_clip(model, tmp_path / "out", some_images(), TEXTS)
    again = tiny_model(seed=5, pretrained=str(tmp_path / "out" / name))
    assert again.image_spec == model.image_spec
    again.eval(), model.eval()
    assert torch.equal(again.encode_image(some_images()), model.encode_image(some_images()))
    own = tiny_model(seed=5, pretrained=str(tmp_path / "out" / name), image_mean=[0.9, 0.9, 0.9])
    assert own.image_spec == model.image_spec.model_copy(update={"mean": (0.9, 0.9, 0.9)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"interpolation": "random"}, "preprocess_cfg: interpolation: found 'random'"),
        ({"mode": "L"}, "preprocess_cfg.mode: 'L' is not RGB"),
        ({"resize_mode": "longest", "fill_color": 255}, "preprocess_cfg.fill_color: 255"),
        ({"std": [0, 1, 1]}, "preprocess_cfg: std"),
    ],
)
def test_preprocessing_that_is_not_done_here_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    export_open_clip(tiny_model(), tmp_path / "out", some_images(), TEXTS)
    path = tmp_path / "out" / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["preprocess_cfg"] |= changes
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        tiny_model(pretrained=str(tmp_path / "out"))


def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": _Code(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match="neither safetensors nor a torch file of plain tensors"):
        tiny_model(pretrained=str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("a.safetensors", b"not weights"), ("b.pt", b"not weights"), ("c.bin", b"")]
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        tiny_model(pretrained=str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_file_and_unknown_tag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        tiny_model(pretrained=str(tmp_path / "none.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no named tensors"):
        tiny_model(pretrained=str(tmp_path / "list.pt"))


def test_a_training_checkpoint_is_a_pretrained_model(tmp_path: Path) -> None:
    source = tiny_model(seed=1)
    state = source.state_dict()
    average = {name: tensor + 1 for name, tensor in state.items()}
    manifest = Manifest(
        step=7, samples=7, num_updates=7, world_size=1, engine="ddp", threads=1, model={}, data={}, versions={}
    )
    sizes = {name: tensor.numel() for name, tensor in state.items()}
    groups = {"weights": (sizes, state.__getitem__)}
    plain = write_checkpoint(tmp_path / "plain", manifest, groups, World())
    averaged = write_checkpoint(tmp_path / "ema", manifest, {**groups, "ema": (sizes, average.__getitem__)}, World())
    for folder, expected in ((plain, state), (averaged, average)):
        loaded = tiny_model(seed=2, pretrained=str(folder)).state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_flipped_bit_in_a_torch_file_is_never_a_traceback(tmp_path: Path, zipped: bool) -> None:
    tensors = {f"block.{number}.weight": torch.ones(3, 5) for number in range(4)}
    torch.save(tensors, tmp_path / "good.pt", _use_new_zipfile_serialization=zipped)
    stored, draw, refused = (tmp_path / "good.pt").read_bytes(), random.Random(0), 0
    for _ in range(300):
        flipped = bytearray(stored)
        flipped[draw.randrange(len(stored))] ^= 1 << draw.randrange(8)
        (tmp_path / "bad.pt").write_bytes(flipped)
        try:
            assert all(isinstance(tensor, Tensor) for tensor in read_weights(tmp_path / "bad.pt", "bad.pt").values())
        except UserError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor([1.0, math.nan]), "'proj' holds what is no finite number"),
        (torch.tensor([1.0, math.inf], dtype=torch.float16), "'proj' holds what is no finite number"),
        (torch.ones(2, dtype=torch.complex64), "'proj' is no plain tensor of real numbers"),
        (torch.eye(2).to_sparse(), "'proj' is no plain tensor of real numbers"),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, tensor: Tensor, words: str) -> None:
    torch.save({"bias": torch.ones(3), "proj": tensor}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=words):
        read_weights(tmp_path / "weights.pt", "weights.pt")


def test_weights_of_another_kind_of_number_are_refused_by_name(tmp_path: Path) -> None:
    weights = to_open_clip(tiny_model())
    path = _save({**weights, "visual.proj": weights["visual.proj"].to(torch.int8)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"pretrained .*: image\.trunk\.proj holds torch\.int8"):
        tiny_model(pretrained=path)
