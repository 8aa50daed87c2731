"""A model configuration with everything written out that names, tags and folders decide."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.coca_model import MultimodalCfg
from open_clip.pretrained import get_pretrained_cfg

from vlm.checkpoint.folder import checkpoint_at
from vlm.checkpoint.format import Checkpoint
from vlm.errors import UserError, nearest
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.config import Architecture, ModelConfig, Towers
from vlm.model.foreign import ForeignFiles
from vlm.model.image_spec import ImageSpec
from vlm.model.logit_scale import INITIAL_LOGIT_SCALE
from vlm.model.open_clip_fields import open_clip_name
from vlm.model.open_clip_folder import WEIGHTS_FILES, read_open_clip_folder
from vlm.model.open_clip_kinds import OpenClipImageConfig, OpenClipTextConfig
from vlm.model.tower_config import ImageTowerConfig
from vlm.model.transformers_halves import are_halves_of_one, both_towers, scale_and_bias

_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def resolve(config: ModelConfig, files: ForeignFiles | None = None) -> ModelConfig:
    """`config` in terms of `towers`, with image preprocessing, pooling, activation and initial scale written out.

    What stands beside pretrained weights (a tag's record, a folder's description) decides preprocessing and activation,
    as the weights were trained with them; what the configuration says itself goes first. Raises UserError for an
    unknown open_clip name, for images that are not square, and for transformers models that cannot be read.
    """
    files = files or ForeignFiles()
    record = pretrained_record(config)
    architecture = architecture_of(config)
    written = _written_towers(config, architecture, files)
    image = written.image.resolved(written.embed_dim, config.image_size, files)
    towers = Towers(embed_dim=written.embed_dim, image=image, text=written.text.resolved(written.embed_dim, files))
    spec = _preprocessing(config, written.image, towers.image, record, files)
    decided: dict[str, Any] = {
        "quick_gelu": _quick_gelu(record, architecture),
        "image_size": spec.size,
        "image_mean": spec.mean,
        "image_std": spec.std,
        "interpolation": spec.interpolation,
        "resize_mode": spec.resize_mode,
        "init_logit_scale": _initial_scale(architecture),
        "init_logit_bias": None if architecture is None else architecture.init_logit_bias,
    }
    if are_halves_of_one(towers):
        decided |= scale_and_bias(towers, files)
    given = {name: getattr(config, name) for name in decided if getattr(config, name) is not None}
    kind: dict[str, Any] = {"open_clip": None, "architecture": None, "transformers": None, "towers": towers}
    return config.model_copy(update={**kind, "captioner": captioner_of(config), **decided, **given})


def without_weights(resolved: ModelConfig) -> ModelConfig:
    """The resolved configuration that builds the same towers and reads no weights for them."""
    assert resolved.towers is not None
    return resolved.model_copy(update={"towers": _unread(resolved.towers), "pretrained": None})


def image_spec(resolved: ModelConfig) -> ImageSpec:
    """The images that a resolved configuration asks for."""
    return ImageSpec.model_validate(
        {
            "size": resolved.image_size,
            "mean": resolved.image_mean,
            "std": resolved.image_std,
            "interpolation": resolved.interpolation,
            "resize_mode": resolved.resize_mode,
        }
    )


def pretrained_tag(config: ModelConfig) -> Mapping[str, Any]:
    """open_clip's record of the pretrained tag of `config`; empty when `pretrained` is no tag."""
    if config.open_clip is None or config.pretrained is None:
        return {}
    return get_pretrained_cfg(open_clip_name(config.open_clip), config.pretrained)  # type: ignore[no-any-return]


def pretrained_record(config: ModelConfig) -> Mapping[str, Any]:
    """The known facts on the images and the activation that the pretrained weights of `config` were trained with."""
    if tag := pretrained_tag(config):
        return tag
    if config.pretrained is None:
        return {}
    path = Path(config.pretrained)
    if (checkpoint := checkpoint_at(path)) is not None:
        model = Checkpoint(checkpoint).manifest.model
        named = {"mean": model.get("image_mean"), "std": model.get("image_std")}
        named |= {name: model.get(name) for name in ("interpolation", "resize_mode", "quick_gelu")}
        return {name: value for name, value in named.items() if value is not None}
    described = read_open_clip_folder(path.parent if path.name in WEIGHTS_FILES else path)
    return {} if described is None else described.record


def architecture_of(config: ModelConfig) -> Architecture | None:
    """The architecture that `config` names or spells out; None where it is made of towers."""
    if config.open_clip is None:
        return config.architecture
    name = open_clip_name(config.open_clip)
    known = open_clip.list_models()
    if name not in known:
        raise UserError(f"open_clip: unknown model {config.open_clip!r}; {nearest(name, known)}")
    return Architecture.model_validate(open_clip.get_model_config(name))


def captioner_of(config: ModelConfig) -> CaptionerConfig | None:
    """The decoder of `config`, which is that of an open_clip architecture where it says nothing of one.

    One whose text tower is no transformer of open_clip's own looks ahead, and is left out.
    """
    if config.captioner is not None:
        return None if config.captioner == "none" else config.captioner
    architecture = architecture_of(config)
    if architecture is None or architecture.multimodal_cfg is None or architecture.text_cfg.get("hf_model_name"):
        return None
    fields = MultimodalCfg(**architecture.multimodal_cfg)
    return CaptionerConfig(
        pooler="tower",
        layers=fields.layers,
        width=fields.width,
        heads=fields.heads,
        layer_scale=fields.ls_init_value,
    )


def _written_towers(config: ModelConfig, architecture: Architecture | None, files: ForeignFiles) -> Towers:
    """The towers as the configuration writes or names them; they read the weights that open_clip would read.

    None when weights of the whole model follow; by open_clip name a Hugging Face text model reads its own and a timm
    model does not; an inline architecture says so itself.
    """
    if architecture is not None:
        towers = _as_towers(architecture)
    elif config.transformers is not None:
        towers = both_towers(config.transformers, files)
    else:
        assert config.towers is not None  # a configuration is of exactly one kind
        towers = config.towers
    if config.pretrained is not None:
        return _unread(towers)
    if config.open_clip is not None:
        return towers.model_copy(update={"image": towers.image.without_weights()})
    return towers


def _unread(towers: Towers) -> Towers:
    without = {"image": towers.image.without_weights(), "text": towers.text.without_weights()}
    return towers.model_copy(update=without)


def _quick_gelu(record: Mapping[str, Any], architecture: Architecture | None) -> bool:
    if record:
        return bool(record.get("quick_gelu"))
    return architecture is not None and architecture.quick_gelu


def _initial_scale(architecture: Architecture | None) -> float:
    log_scale = None if architecture is None else architecture.init_logit_scale
    return INITIAL_LOGIT_SCALE if log_scale is None else math.exp(log_scale)


def _as_towers(architecture: Architecture) -> Towers:
    # Towers that also return their tokens do so for a caption decoder.
    return Towers(
        embed_dim=architecture.embed_dim,
        image=OpenClipImageConfig(vision_cfg={**architecture.vision_cfg, "output_tokens": False}),
        text=OpenClipTextConfig(text_cfg={**architecture.text_cfg, "output_tokens": False}),
    )


def _preprocessing(
    config: ModelConfig,
    written: ImageTowerConfig,
    image: ImageTowerConfig,
    record: Mapping[str, Any],
    files: ForeignFiles,
) -> ImageSpec:
    """The images of a tower (resolved from what is `written`), unless weights of the whole model have a record."""
    given = (config.image_size, config.image_mean, config.image_std, config.interpolation, config.resize_mode)
    if all(field is not None for field in given):
        return image_spec(config)
    named = {name: record[name] for name in _PREPROCESSING if name in record}
    if record and config.image_size is not None:
        return ImageSpec.model_validate({"size": config.image_size, **named})
    images = dict(image.images(files))
    if record:
        return ImageSpec.model_validate({"size": images["size"], **named})
    if type(written) is not type(image):
        images = {**written.images(files), **images}
    return ImageSpec.model_validate(images)
