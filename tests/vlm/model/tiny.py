"""Dual encoders small enough to build in a test, and open_clip's own modules from the same description."""

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor

from vlm.batch import Images, Texts
from vlm.model.build import build_model
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.open_clip_names import to_open_clip
from vlm.outputs import PAIR

CONTEXT = 16
TEXTS = ["a dog", "two small cats on a wet table", "red", "a photo of the very long street at night"]
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def architecture(
    vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": vision or VIT, "text_cfg": {**TEXT, **(text or {})}, **fields}


def tiny_model(seed: int = 0, **fields: Any) -> DualEncoder:
    return build_model(ModelConfig.model_validate({"architecture": architecture(), **fields}), seed)


def open_clip_twin(model: DualEncoder, fields: dict[str, Any]) -> Any:
    """open_clip's own class for the same architecture with the same weights."""
    plain = not any(name.startswith("text.") for name in to_open_clip(model))
    known = {name: value for name, value in fields.items() if name not in ("custom_text", "multimodal_cfg")}
    twin = (open_clip.CLIP if plain else open_clip.CustomTextCLIP)(**known)
    twin.load_state_dict(to_open_clip(model))
    return twin.eval()


def some_images(count: int = 3, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def normalised(images: Tensor, model: DualEncoder) -> Tensor:
    """The pixels that other systems' networks take, of type fp32 or what `images` has."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.image.spec.mean, model.image.spec.std))
    return (images / 255 - mean) / std


def outputs_of(model: DualEncoder, images: Tensor, texts: Sequence[str] = TEXTS) -> dict[str, Tensor]:
    """The outputs of a forward of images and texts, by name."""
    outputs: dict[str, Tensor] = model({"image": Images(images), "text": Texts(*model.tokenizer(texts))}, PAIR)
    return outputs


def perturb(model: torch.nn.Module, seed: int = 5) -> None:
    """Move every parameter off its initial value, so that zeros and ones hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
