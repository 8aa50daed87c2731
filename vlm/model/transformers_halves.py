"""What transformers models decide where a configuration of towers leaves it open; CLIP and SigLIP are read whole."""

import math

from transformers import PreTrainedConfig

from vlm.errors import UserError
from vlm.model.clean_configuration import refusing
from vlm.model.config import ImageTowerConfig, TextTowerConfig, Towers
from vlm.model.foreign import ForeignFiles, Part
from vlm.model.image_spec import ImageSpec
from vlm.model.logit_scale import MAX_LOGIT_SCALE
from vlm.model.transformers_images import image_preprocessing

DEFAULT_CONTEXT_LENGTH = 77
_WHOLE = ("clip", "siglip")  # dual encoders of which a tower can be a half
_SIGLIP_SCALE, _SIGLIP_BIAS = 10.0, -10.0  # at the start of training (Zhai et al., 2023)


def whole_towers(name: str, files: ForeignFiles) -> Towers:
    """Both halves of the CLIP or SigLIP called `name`. Raises UserError for other models."""
    with refusing("transformers", name):
        configuration = files.configuration("image", name)
        if configuration.model_type not in _WHOLE:
            raise UserError(
                f"model_type {configuration.model_type} is not read whole (choose from: {', '.join(_WHOLE)}); "
                "`towers:` takes an image and a text model"
            )
        return Towers(
            embed_dim=_own_dim(configuration, "image"),
            image=ImageTowerConfig(transformers=name),
            text=TextTowerConfig(transformers=name),
        )


def completed(towers: Towers, files: ForeignFiles) -> Towers:
    """The towers with pooling and context length written out. Raises UserError for halves that do not fit."""
    return towers.model_copy(update={"image": _image(towers, files), "text": _text(towers, files)})


def _image(towers: Towers, files: ForeignFiles) -> ImageTowerConfig:
    image = towers.image
    if image.transformers is None or image.pool is not None:
        return image
    with refusing("towers.image.transformers", image.transformers):
        configuration = files.configuration("image", image.transformers)
        pool = _default_pool("image", configuration)
        if pool == "own":
            _require_dim("image", towers, configuration)
        return image.model_copy(update={"pool": pool})


def _text(towers: Towers, files: ForeignFiles) -> TextTowerConfig:
    text = towers.text
    if text.transformers is None or not (text.pool is None or text.context_length is None):
        return text
    with refusing("towers.text.transformers", text.transformers):
        configuration = files.configuration("text", text.transformers)
        pool = text.pool or _default_pool("text", configuration)
        if pool == "own":
            _require_dim("text", towers, configuration)
        context_length = text.context_length or _default_context_length(configuration)
        return text.model_copy(update={"pool": pool, "context_length": context_length})


def are_halves_of_one(towers: Towers) -> bool:
    """Whether both towers are the halves of one model, whose scale and bias are then this model's."""
    image, text = towers.image, towers.text
    return image.pool == text.pool == "own" and image.transformers == text.transformers


def scale_and_bias(towers: Towers, files: ForeignFiles) -> dict[str, float | None]:
    """What a training of this dual encoder begins with, before its weights say what it has learned."""
    assert towers.image.transformers is not None
    with refusing("towers.image.transformers", towers.image.transformers):
        configuration = files.configuration("image", towers.image.transformers)
        if configuration.model_type == "siglip":
            return {"init_logit_scale": _SIGLIP_SCALE, "init_logit_bias": _SIGLIP_BIAS}
        scale = math.exp(min(float(configuration.logit_scale_init_value), math.log(MAX_LOGIT_SCALE)))
    return {"init_logit_scale": min(scale, MAX_LOGIT_SCALE), "init_logit_bias": None}


def transformers_images(towers: Towers, files: ForeignFiles) -> ImageSpec:
    """The images that the vision model was made for; what cannot be said of them becomes a notice.

    Raises UserError for a CLIP or SigLIP whose images cannot be described.
    """
    name = towers.image.transformers
    assert name is not None
    with refusing("towers.image.transformers", name):
        configuration = files.configuration("image", name)
        size = getattr(getattr(configuration, "vision_config", configuration), "image_size", None)
        if isinstance(size, list | tuple) and len(set(size)) == 1:
            size = size[0]
        if size is not None and not isinstance(size, int):
            raise UserError(f"image_size {size}; images must be square")
        spec, departures = image_preprocessing(files.image_processor(name), configuration.model_type, size)
        if departures and towers.image.pool == "own":
            raise UserError(
                f"its image processor cannot be followed ({departures[0]}); say image_size, image_mean, image_std, "
                "interpolation and resize_mode to do it another way"
            )
    files.notices += [f"{name}: of its image processor, {departure}" for departure in departures]
    return spec


def _default_pool(part: Part, configuration: PreTrainedConfig) -> str:
    kind = configuration.model_type
    if kind in _WHOLE:
        return "own"
    left_out = next((one for one in configuration.architectures or () if str(one).endswith("WithProjection")), None)
    if left_out is None and not hasattr(configuration, "text_config"):
        return "pooler" if part == "image" or kind == "siglip_text_model" else "mean"
    raise UserError(
        f"{left_out or kind} has a projection that is not read (whole are read: {', '.join(_WHOLE)}); say a pool to "
        f"take its {part} model with a new projection"
    )


def _default_context_length(configuration: PreTrainedConfig) -> int:
    text = getattr(configuration, "text_config", configuration)
    if configuration.model_type in _WHOLE or text.model_type == "siglip_text_model":
        return int(text.max_position_embeddings)
    return DEFAULT_CONTEXT_LENGTH


def _require_dim(part: Part, towers: Towers, configuration: PreTrainedConfig) -> None:
    dim, name = _own_dim(configuration, part), getattr(towers, part).transformers
    if dim != towers.embed_dim:
        raise UserError(
            f"towers.embed_dim: found {towers.embed_dim}, but the {part} half of {name} has a projection to {dim}; "
            f"say towers.{part}.pool to take its {part} model with a new projection"
        )


def _own_dim(configuration: PreTrainedConfig, part: Part) -> int:
    if configuration.model_type == "clip":
        return int(configuration.projection_dim)
    if part == "image":
        return int(configuration.vision_config.hidden_size)
    return int(configuration.text_config.projection_size)
