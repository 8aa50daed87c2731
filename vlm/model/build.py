"""From a configuration to a dual encoder with seeded or pretrained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.integrations import deepspeed as hf_deepspeed

from vlm.model import open_clip_towers, transformers_towers
from vlm.model.batch_norm import without_batch_norm
from vlm.model.config import ModelConfig, TextTowerConfig, Towers
from vlm.model.dual_encoder import DualEncoder
from vlm.model.image_spec import ImageSpec
from vlm.model.pretrained import load_pretrained_weights
from vlm.model.resolve import image_spec, resolve, without_weights
from vlm.model.tokenizer import Tokenizer, full_tokenizer
from vlm.model.towers import ImageTower, TextTower


def build_model(config: ModelConfig, seed: int = 0, *, load_pretrained: bool = True) -> DualEncoder:
    """The dual encoder that `config` describes, on the CPU in fp32, in training mode.

    Its fresh weights depend on `seed` alone, and the caller's random state is left as it was. Without `load_pretrained`
    no weights are read or downloaded (a checkpoint's will follow). Raises UserError for what cannot be built or loaded.
    """
    resolved = resolve(config)
    skeleton = without_weights(resolved)
    with _seeded(seed), _whole_weights():
        model = _assemble(resolved if load_pretrained else skeleton, skeleton)
    if load_pretrained and config.pretrained is not None:
        load_pretrained_weights(model, config)
    return model.train()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Keep transformers from sharding new weights under ZeRO-3: the engine shards the whole model later."""
    configured = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = configured


def _assemble(resolved: ModelConfig, skeleton: ModelConfig) -> DualEncoder:
    assert resolved.towers is not None
    spec, quick_gelu, freeze = image_spec(resolved), bool(resolved.quick_gelu), resolved.freeze_batch_norm
    trunk = without_batch_norm(_image_trunk(resolved.towers, spec, quick_gelu=quick_gelu), "image", freeze=freeze)
    text, tokenizer = _text_tower(resolved.towers, quick_gelu=quick_gelu)
    without_batch_norm(text, "text", freeze=freeze)
    return DualEncoder(skeleton, ImageTower(trunk, spec), text, tokenizer)


def _image_trunk(towers: Towers, spec: ImageSpec, *, quick_gelu: bool) -> nn.Module:
    if towers.image.vision_cfg is None:
        return transformers_towers.build_image_trunk(towers.image, towers.embed_dim, spec.size)
    return open_clip_towers.build_image_trunk(towers.embed_dim, towers.image.vision_cfg, quick_gelu=quick_gelu)


def _text_tower(towers: Towers, *, quick_gelu: bool) -> tuple[TextTower, Tokenizer]:
    text_cfg = towers.text.text_cfg
    full = full_tokenizer(_tokenizer_fields(towers.text) if text_cfg is None else text_cfg)
    fixed = Tokenizer(full, shorten=False)
    if text_cfg is None:
        tower = transformers_towers.build_text_tower(towers.text, towers.embed_dim, fixed.pad_id)
    else:
        tower = open_clip_towers.build_text_tower(
            towers.embed_dim, text_cfg, fixed.context_length, fixed.pad_id, quick_gelu=quick_gelu
        )
    return tower, Tokenizer(full, shorten=tower.may_shorten)


def _tokenizer_fields(config: TextTowerConfig) -> dict[str, object]:
    return {"hf_tokenizer_name": config.tokenizer or config.transformers, "context_length": config.context_length}
