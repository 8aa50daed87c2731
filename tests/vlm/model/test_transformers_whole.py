"""transformers' CLIP and SigLIP are taken in whole: embeddings, scale, bias and images are the library's own."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize

from data.images.views import evaluation_view
from tests.vlm.model.hugging_face import save_text_model, save_vision_model, save_whole
from tests.vlm.model.tiny import TEXT, TEXTS, VIT, some_images
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder

KINDS = ("clip", "siglip")


def built(**fields: Any) -> DualEncoder:
    return build_model(ModelConfig.model_validate(fields)).eval()


def library_rows(kind: str, folder: Path, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's embeddings of pixels that are normalised here, and of texts that its own tokenizer splits."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    if kind == "siglip":
        mean, std = [0.5] * 3, [0.5] * 3
    pixels = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    if kind == "siglip":
        ids = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
        texts = model.get_text_features(input_ids=ids)
    else:
        texts = model.get_text_features(**tokenizer(TEXTS, padding=True, return_tensors="pt"))
    pictures = model.get_image_features(pixel_values=pixels)
    return normalize(pictures.pooler_output, dim=-1), normalize(texts.pooler_output, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_scale_and_bias_are_the_librarys_own(tmp_path: Path, kind: str) -> None:
    save_whole(tmp_path, kind)
    images, texts = library_rows(kind, tmp_path, some_images(4))
    name = str(tmp_path)
    dim = 24 if kind == "clip" else 32
    halves = {"embed_dim": dim, "image": {"transformers": name}, "text": {"transformers": name}}
    for fields in ({"transformers": name}, {"towers": {"transformers": name}}, {"towers": halves}):
        model = built(**fields)
        torch.testing.assert_close(model.encode_image(some_images(4)), images, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(*model.tokenizer(TEXTS)), texts, rtol=0, atol=1e-5)
        assert model.logit_scale.item() == pytest.approx(3.3)
        assert (model.logit_bias is None) == (kind == "clip")
        if model.logit_bias is not None:
            assert model.logit_bias.item() == pytest.approx(-7.5)
    # Texts of one batch do not depend on what is beside them, or on how far they are padded.
    alone = torch.cat([model.encode_text(*model.tokenizer([text])) for text in TEXTS])
    torch.testing.assert_close(alone, texts, rtol=0, atol=1e-5)
    assert built(transformers=name, init_logit_scale=20).logit_scale.exp().item() == pytest.approx(20)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processor", [True, False])
def test_pictures_are_resized_as_the_processor_says(tmp_path: Path, kind: str, processor: bool) -> None:
    """Squashed or cropped: the library's pixels of a wide picture are ours, up to the two libraries' resampling."""
    save_whole(tmp_path, kind, processor=processor)
    spec = built(transformers=str(tmp_path)).image_spec
    assert (spec.size, spec.resize_mode) == (32, "squash" if kind == "siglip" else "shortest")
    rows, columns = np.mgrid[0:60, 0:100]
    picture = Image.fromarray(np.stack([rows * 4, columns * 2, rows + columns], axis=-1).astype(np.uint8))
    picture.save(tmp_path / "picture.png")
    ours = torch.tensor(evaluation_view((tmp_path / "picture.png").read_bytes(), spec)).permute(2, 0, 1)
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
    if processor:
        theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt").pixel_values[0]
        assert ((ours / 255 - mean) / std - theirs).abs().max() < 0.05


def test_a_rescale_factor_and_missing_steps_become_mean_and_deviation(tmp_path: Path) -> None:
    save_vision_model(tmp_path)
    images = some_images()
    for options in (
        {"do_rescale": True, "rescale_factor": 1 / 127.5, "image_mean": [0.9, 1.0, 1.1], "image_std": [1.0, 0.5, 1.0]},
        {"do_rescale": False, "image_mean": [100.0, 110.0, 120.0], "image_std": [50.0, 60.0, 70.0]},
        {"do_normalize": False},
    ):
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **options)
        processor.save_pretrained(tmp_path)
        spec = built(towers=_with_text(tmp_path)).image_spec
        mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]
        theirs = processor(list(images), return_tensors="pt").pixel_values
        torch.testing.assert_close((images / 255 - mean) / std, theirs, rtol=1e-4, atol=1e-4)


def _with_text(folder: Path, **image: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "image": {"transformers": str(folder), **image}, "text": {"text_cfg": TEXT}}


def test_one_half_beside_another_kind_of_tower(tmp_path: Path) -> None:
    model = save_whole(tmp_path / "clip", "clip")
    mixed = built(towers=_with_text(tmp_path / "clip"))
    assert torch.equal(mixed.image.trunk.get_parameter("projection.weight"), model.visual_projection.weight)
    assert mixed.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    text = {"transformers": str(tmp_path / "clip")}
    mixed = built(towers={"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": text})
    assert torch.equal(mixed.text.get_parameter("projection.weight"), model.text_projection.weight)


def test_what_cannot_be_read_whole_is_refused_by_name(tmp_path: Path) -> None:
    save_whole(tmp_path / "clip", "clip")
    with pytest.raises(UserError, match=r"found 16, but the image half of .*clip has a projection to 24"):
        built(towers={**_with_text(tmp_path / "clip"), "embed_dim": 16})
    pooled = built(towers={**_with_text(tmp_path / "clip", pool="pooler"), "embed_dim": 16})
    assert pooled.encode_image(some_images()).shape == (3, 16)
    with pytest.raises(UserError, match=r"position_embedding.weight is \[17, 32\] in its files but \[5, 32\]"):
        built(transformers=str(tmp_path / "clip"), image_size=16)
    save_text_model(tmp_path / "bert")
    with pytest.raises(UserError, match="model_type bert is not read whole"):
        built(transformers=str(tmp_path / "bert"))
    configuration = transformers.CLIPVisionConfig(image_size=32, patch_size=8, hidden_size=32, num_attention_heads=2)
    projected = transformers.CLIPVisionModelWithProjection(configuration)
    projected.save_pretrained(tmp_path / "projected")
    with pytest.raises(UserError, match="CLIPVisionModelWithProjection has a projection that is not read"):
        built(towers=_with_text(tmp_path / "projected"))
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="resized to 32 before the crop, not to 40"):
        built(transformers=str(tmp_path / "clip"))
    said = {"image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert built(transformers=str(tmp_path / "clip"), **said, interpolation="bicubic", resize_mode="shortest")


def test_untrained_shapes_begin_where_a_training_begins(tmp_path: Path) -> None:
    save_whole(tmp_path, "siglip")
    name = str(tmp_path)
    halves = {"image": {"transformers": name, "pretrained": False}, "text": {"transformers": name, "pretrained": False}}
    model = built(towers={"embed_dim": 32, **halves})
    assert model.logit_bias is not None
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10
