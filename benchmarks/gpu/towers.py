"""Towers on the device beside open_clip's in float64: embeddings, and gradients of all weights."""

import open_clip
import torch
from torch import Tensor, nn

from benchmarks.gpu.setting import Line, Setting, full_precision, relative
from benchmarks.step.systems import CONTEXT, batches, own_model
from vlm.batch import Batch
from vlm.model.attention import choose_attention
from vlm.model.dual_encoder import DualEncoder
from vlm.model.exchange import open_clip_config
from vlm.model.open_clip_names import to_open_clip

_PAIRS = 8
_BOUNDS = {"fp32": (1e-4, 1e-3), "bf16": (5e-2, 1.5e-1)}  # of embeddings, of gradients


def check_towers(setting: Setting) -> list[Line]:
    """In fp32, without TF32."""
    with full_precision():
        return _compared(setting, "fp32")


def check_bf16(setting: Setting) -> list[Line]:
    """Under autocast to bf16, as a run computes them: with the attention that it chooses, and texts in groups."""
    return _compared(setting, "bf16")


def _compared(setting: Setting, precision: str) -> list[Line]:
    name = "tiny" if setting.quick else "b32"
    model = own_model(name)
    _perturb(model)
    choose_attention(model, "auto")
    model.text.groups_texts = True
    batch = next(batches(name, None, pairs=_PAIRS))
    wanted = _of_open_clip(model, batch)
    found = _of_vlm(model.to(setting.place), batch.to(setting.place), precision)
    of_embeddings, of_gradients = _BOUNDS[precision]
    lines = [
        Line(f"{kind} embeddings", max(map(relative, found[kind], wanted[kind])), of_embeddings)
        for kind in ("image", "text")
    ]
    return [*lines, Line("gradients of all weights", relative(found["gradients"], wanted["gradients"]), of_gradients)]


def _of_vlm(model: DualEncoder, batch: Batch, precision: str) -> dict[str, Tensor]:
    with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        made = model(batch.parts, frozenset({"image", "text"}))
    _loss(made["image"].float(), made["text"].float()).backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = to_open_clip(model)  # under the names that the other model has
    return {
        **made,
        "gradients": torch.cat([gradients[name].flatten() for name in sorted(gradients) if "logit" not in name]),
    }


def _of_open_clip(model: DualEncoder, batch: Batch) -> dict[str, Tensor]:
    fields = open_clip_config(model)
    fields.pop("custom_text")
    peer = open_clip.CLIP(**fields).double()
    peer.load_state_dict(to_open_clip(model))
    means, stds = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    tokens = batch.texts.tokens
    image = peer.encode_image((batch.pixels / 255.0 - means) / stds, normalize=True)
    text = peer.encode_text(nn.functional.pad(tokens, (0, CONTEXT - tokens.shape[1])), normalize=True)
    _loss(image, text).backward()
    named = dict(peer.named_parameters())
    gradients = [named[name].grad for name in sorted(named) if "logit" not in name]
    return {
        "image": image,
        "text": text,
        "gradients": torch.cat([one.flatten() for one in gradients if one is not None]),
    }


def _loss(image: Tensor, text: Tensor) -> Tensor:
    """Numbers that depend on every coordinate of every embedding."""
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(some.shape, dtype=torch.float64, generator=generator) for some in (image, text)]
    one, other = ((some * factor.to(some)).sum() for some, factor in zip((image, text), factors, strict=True))
    total: Tensor = one + other
    return total


def _perturb(model: nn.Module) -> None:
    """Weights that begin as 0 or 1 would hide what is wrong with them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "logit" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
