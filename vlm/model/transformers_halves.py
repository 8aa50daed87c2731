"""CLIP and SigLIP of transformers, whole: both towers with their projections, and scale and bias between them."""

import math

from vlm.errors import UserError
from vlm.model.clean_configuration import refusing
from vlm.model.config import Towers
from vlm.model.foreign import ForeignFiles
from vlm.model.logit_scale import MAX_LOGIT_SCALE
from vlm.model.transformers_kinds import (
    DUAL_ENCODERS,
    IMAGE_KEY,
    TransformersImageConfig,
    TransformersTextConfig,
    projection_dim,
)

_SIGLIP_SCALE, _SIGLIP_BIAS = 10.0, -10.0  # at the start of training (Zhai et al., 2023)


def both_towers(name: str, files: ForeignFiles) -> Towers:
    """Both halves of the CLIP or SigLIP called `name`. Raises UserError for other models."""
    with refusing("transformers", name):
        configuration = files.configuration("image", name)
        if configuration.model_type not in DUAL_ENCODERS:
            raise UserError(
                f"model_type {configuration.model_type} is not read whole (choose from: {', '.join(DUAL_ENCODERS)}); "
                "`towers:` takes an image and a text model"
            )
        return Towers(
            embed_dim=projection_dim(configuration, "image"),
            image=TransformersImageConfig(transformers=name),
            text=TransformersTextConfig(transformers=name),
        )


def are_halves_of_one(towers: Towers) -> bool:
    """Whether both towers are the halves of one model, whose scale and bias are then this model's."""
    image, text = towers.image, towers.text
    if not (isinstance(image, TransformersImageConfig) and isinstance(text, TransformersTextConfig)):
        return False
    return image.pool == text.pool == "own" and (image.transformers, image.weights) == (text.transformers, text.weights)


def scale_and_bias(towers: Towers, files: ForeignFiles) -> dict[str, float | None]:
    """The scale and bias that a training of this dual encoder begins with, before its weights are read."""
    assert isinstance(towers.image, TransformersImageConfig)
    with refusing(IMAGE_KEY, towers.image.transformers):
        configuration = files.configuration("image", towers.image.transformers)
        if configuration.model_type == "siglip":
            return {"init_logit_scale": _SIGLIP_SCALE, "init_logit_bias": _SIGLIP_BIAS}
        scale = math.exp(min(float(configuration.logit_scale_init_value), math.log(MAX_LOGIT_SCALE)))
    return {"init_logit_scale": min(scale, MAX_LOGIT_SCALE), "init_logit_bias": None}
