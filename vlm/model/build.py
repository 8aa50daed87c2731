"""From a configuration to a dual encoder with seeded or pretrained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers.integrations import deepspeed as hf_deepspeed

from vlm.errors import EveryRankError
from vlm.model.attach import attach_captioner, read_gap_statistics
from vlm.model.batch_norm import without_batch_norm
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.foreign import ForeignFiles
from vlm.model.lock import AllBut
from vlm.model.pretrained import load_pretrained_weights
from vlm.model.resolve import architecture_of, captioner_of, image_spec, resolve, without_weights
from vlm.model.shapes import Shapes
from vlm.model.tokenizer import Tokenizer, full_tokenizer
from vlm.model.tower_config import TextTowerConfig, TowerContext
from vlm.model.tower_weights import load_tower_weights
from vlm.model.towers import ImageTower, TextTower, Tower
from vlm.model.transformers_halves import are_halves_of_one
from vlm.model.transformers_models import TransformersModels
from vlm.model.trial import require_working
from vlm.model.vocabulary import require_vocabulary


def build_model(
    config: ModelConfig, seed: int = 0, *, load_pretrained: bool = True, files: ForeignFiles | None = None
) -> DualEncoder:
    """The dual encoder that `config` describes, on the CPU in fp32, in training mode.

    Its fresh weights depend on `seed` alone, and the caller's random state is left as it was. Without `load_pretrained`
    no weights are read or downloaded (a checkpoint's will follow). Configurations and tokenizers of transformers come
    from `files`, by default from where `config` names them. Raises UserError for what cannot be built or loaded.
    """
    files = files or ForeignFiles()
    resolved = resolve(config, files)
    skeleton = without_weights(resolved)
    with _seeded(seed), _unsharded_weights():
        model = _assemble(resolved if load_pretrained else skeleton, skeleton, files, config)
        require_working(model)
        if isinstance(resolved.captioner, CaptionerConfig):
            attach_captioner(model, resolved.captioner)
        # After what may replace a tower's blocks.
        _lock(model.image, "image", resolved.lock.image)
        _lock(model.text, "text", resolved.lock.text)
    if load_pretrained and config.pretrained is not None:
        load_pretrained_weights(model, config)
    if load_pretrained and isinstance(resolved.captioner, CaptionerConfig):
        read_gap_statistics(model, resolved.captioner)
    model.files = dict(files.used)
    model.notices = (*files.notices, *_left_out(config))
    return model.train()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _unsharded_weights() -> Iterator[None]:
    """Keep transformers from sharding new weights under ZeRO-3: the engine shards the whole model later."""
    configured = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = configured


def build_shapes(config: ModelConfig, files: ForeignFiles | None = None) -> tuple[DualEncoder, Shapes]:
    """The dual encoder that `config` describes with shapes for parameters, and the place where it computes.

    Nothing is tried and no weights are read, so it takes no memory and little time whatever its size. Raises UserError
    for what cannot be built.
    """
    files, shapes = files or ForeignFiles(), Shapes()
    resolved = resolve(config, files)
    skeleton = without_weights(resolved)
    with _seeded(0), _unsharded_weights():
        with init_empty_weights(include_buffers=False):
            model = _assemble(skeleton, skeleton, files, config)
        shapes.adopt(model)
        if isinstance(resolved.captioner, CaptionerConfig):
            with shapes():
                attach_captioner(model, resolved.captioner, tried=False)
            shapes.adopt(model)
    _lock(model.image, "image", resolved.lock.image)
    _lock(model.text, "text", resolved.lock.text)
    return model.train(), shapes


def _assemble(resolved: ModelConfig, skeleton: ModelConfig, files: ForeignFiles, config: ModelConfig) -> DualEncoder:
    towers = resolved.towers
    assert towers is not None
    models, spec = TransformersModels(), image_spec(resolved)
    captioner = resolved.captioner if isinstance(resolved.captioner, CaptionerConfig) else None
    split = None if captioner is None else captioner.language_model
    context = TowerContext(towers.embed_dim, spec.size, bool(resolved.quick_gelu), files, models, split)
    freeze, lock = resolved.freeze_batch_norm, resolved.lock
    trunk = without_batch_norm(towers.image.build(context), "image", freeze=freeze, locked=lock.image == "all")
    text, tokenizer = _text_tower(towers.text, context, captioned=captioner is not None)
    without_batch_norm(text, "text", freeze=freeze, locked=lock.text == "all")
    model = DualEncoder(skeleton, ImageTower(trunk, spec), text, tokenizer)
    for name, tower, kind in (("image", model.image, towers.image), ("text", model.text, towers.text)):
        if kind.weights_file is not None:
            files.notices += load_tower_weights(tower, kind.weights_file, f"towers.{name}.weights")
    if are_halves_of_one(towers) and getattr(towers.image, "reads_model", False):
        _take_scale_and_bias(model, models.scale_and_bias(), config)
    return model


def _lock(tower: Tower, name: str, lock: Literal["all"] | AllBut | None) -> None:
    if lock is None:
        return
    try:
        tower.lock(0 if lock == "all" else lock.all_but)
    except ValueError as error:
        raise EveryRankError(f"model.lock.{name}.all_but: {error}") from None


@torch.no_grad()
def _take_scale_and_bias(model: DualEncoder, learned: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Go on from where a dual encoder's own are, unless `config` says where to start."""
    if config.init_logit_scale is None and "logit_scale" in learned:
        model.logit_scale.copy_(learned["logit_scale"])
    if config.init_logit_bias is None and model.logit_bias is not None and "logit_bias" in learned:
        model.logit_bias.copy_(learned["logit_bias"])


def _text_tower(config: TextTowerConfig, context: TowerContext, *, captioned: bool) -> tuple[TextTower, Tokenizer]:
    full = full_tokenizer(config.tokenizer_fields(), context.files, marked=captioned)
    tower = config.build(context, Tokenizer(full, shorten=False, marked=captioned))
    vocabulary = require_vocabulary(full, tower, learned=config.brings_vocabulary)
    return tower, Tokenizer(full, shorten=tower.may_shorten, vocabulary=vocabulary, marked=captioned)


def _left_out(config: ModelConfig) -> list[str]:
    """Lines on what a configuration describes and this model has not."""
    architecture = architecture_of(config)
    if architecture is None or architecture.multimodal_cfg is None or captioner_of(config) is not None:
        return []
    name = config.open_clip or "architecture"
    return [f"{name}: its caption decoder (multimodal_cfg) is left out; only the image and the text tower are used"]
