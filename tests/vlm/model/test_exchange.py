"""Exported models are open_clip's: it loads them, tokenises and preprocesses for them, and computes the same."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests.vlm.model.hugging_face import save_text_model, save_tokenizer, save_vision_model
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, architecture, perturb, some_images, tiny_model
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.exchange import export_open_clip

SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
CONVNEXT = {"timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_proj": "linear", "timm_pool": ""}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"architecture": architecture(), "quick_gelu": True},
    "siglip": {"architecture": architecture(text=SIGLIP, init_logit_bias=-10)},
    "class token": {"architecture": architecture(text={"embed_cls": True})},
    "convnext": {"architecture": architecture({**CONVNEXT, "image_size": 32})},
    "resnet": {"architecture": architecture(RESNET), "freeze_batch_norm": True},
    "towers": {"towers": {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": {**TEXT, **SIGLIP}}}},
}


def _encode(folder: Path, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.nn.Module]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = torch.stack([preprocess(picture) for picture in pictures])
    with torch.no_grad():
        model.eval()
        return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True), model


@pytest.mark.parametrize("kind", MODELS)
def test_open_clip_loads_the_export_and_computes_the_same(tmp_path: Path, kind: str) -> None:
    model = tiny_model(**{"architecture": None, **MODELS[kind]}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    perturb(model)
    parity = export_open_clip(model, tmp_path / "out", some_images(), TEXTS)
    assert max(parity.image, parity.text) < 1e-5
    assert (parity.num_images, parity.num_texts) == (3, len(TEXTS))
    assert model.training
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    image, text, theirs = _encode(tmp_path / "out", some_images())
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(model.encode_image(some_images()), image, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(*model.tokenizer(TEXTS)), text, rtol=0, atol=1e-5)
    assert theirs.logit_scale.shape == ()
    torch.testing.assert_close(theirs.logit_scale, model.logit_scale.detach()[0], rtol=0, atol=0)
    if model.logit_bias is not None:
        torch.testing.assert_close(theirs.logit_bias, model.logit_bias.detach()[0])


def test_preprocessing_arrives(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    export_open_clip(tiny_model(**fields), tmp_path / "out", some_images(), TEXTS)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    kept = theirs.visual.preprocess_cfg
    assert (list(kept["mean"]), list(kept["std"])) == (fields["image_mean"], fields["image_std"])
    assert (kept["interpolation"], kept["resize_mode"]) == ("bilinear", "squash")
    assert theirs.visual.image_size == (32, 32)
    assert preprocess(Image.new("RGB", (80, 50))).shape == (3, 32, 32)


def test_a_scale_above_the_limit_is_exported_at_the_limit(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(300))
    export_open_clip(model, tmp_path / "out", some_images(), TEXTS)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert theirs.logit_scale.exp().item() == pytest.approx(100)


def test_hugging_face_tower_and_tokenizer_travel_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_text_model(source, "bert")
    text = {
        "hf_model_name": str(source),
        "hf_tokenizer_name": str(source),
        "hf_model_pretrained": True,
        "hf_proj_type": "mlp",
        "context_length": 16,
    }
    model = build_model(ModelConfig.model_validate({"architecture": {**architecture(), "text_cfg": text}}))
    perturb(model)
    assert export_open_clip(model, tmp_path / "out", some_images(), TEXTS).text < 1e-5

    described = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**described, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(UserError, match=r"config\.json names code of its own \(auto_map\)"):
        export_open_clip(model, tmp_path / "again", some_images(), TEXTS)
    assert not (tmp_path / "again").exists()


def test_a_causal_tower_with_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    size = save_tokenizer(source)
    text = {"hf_tokenizer_name": str(source), "vocab_size": size, "pool_type": "eos", "eos_id": 3}
    model = tiny_model(architecture=architecture(text=text))
    assert model.text.may_shorten
    assert export_open_clip(model, tmp_path / "out", some_images(), TEXTS).text < 1e-5


def test_an_export_is_a_pretrained_model(tmp_path: Path) -> None:
    model = tiny_model(seed=4)
    export_open_clip(model, tmp_path / "out", some_images(), TEXTS)
    again = tiny_model(seed=5, pretrained=str(tmp_path / "out"))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_what_open_clip_cannot_express_is_refused(tmp_path: Path) -> None:
    save_vision_model(tmp_path / "vit")
    towers = {"embed_dim": 24, "image": {"transformers": str(tmp_path / "vit")}, "text": {"text_cfg": TEXT}}
    model = build_model(ModelConfig.model_validate({"towers": towers}))
    with pytest.raises(UserError, match="open_clip has no counterpart of the image tower"):
        export_open_clip(model, tmp_path / "out", some_images(), TEXTS)
    resized = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "image_size": 64}
    with pytest.raises(UserError, match="open_clip cannot load this model") as caught:
        export_open_clip(tiny_model(architecture=architecture(resized)), tmp_path / "out", some_images(2, 64), TEXTS)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_an_export_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    true_encoding = DualEncoder.encode_text
    monkeypatch.setattr(DualEncoder, "encode_text", lambda self, *texts: true_encoding(self, *texts) + 1e-4)
    with pytest.raises(UserError, match=r"texts by up to 1\.0e-04"):
        export_open_clip(model, tmp_path / "out", some_images(), TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export_open_clip(tiny_model(), tmp_path, some_images(), TEXTS)
    with pytest.raises(UserError, match="cannot be made"):
        export_open_clip(tiny_model(), tmp_path / "note.txt" / "out", some_images(), TEXTS)
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_parity_on_photographs(tmp_path: Path) -> None:
    """JPEG-decoded pictures of another size, resized by open_clip's own preprocessing of the export."""
    model = tiny_model()
    export_open_clip(model, tmp_path / "out", some_images(), TEXTS)
    rows, columns = np.mgrid[0:90, 0:120]
    picture = np.stack([rows * 2, columns * 2, (rows + columns)], axis=-1).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "jpeg")
    decoded = Image.open(encoded).convert("RGB")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    *resizing, _, _ = preprocess.transforms
    resized = decoded
    for step in resizing:
        resized = step(resized)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = theirs.eval().encode_image(preprocess(decoded)[None], normalize=True)
        torch.testing.assert_close(model.eval().encode_image(pixels), expected, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 24
