"""Which dual encoder to build: by open_clip name, by an inline architecture, or from transformers towers."""

from functools import cache
from typing import Any, Literal

from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from pydantic import Field, PositiveInt, TypeAdapter, ValidationError, field_validator, model_validator

from vlm.config import Config
from vlm.errors import nearest
from vlm.model.heads import HeadConfig
from vlm.model.logit_scale import MAX_LOGIT_SCALE


class Architecture(Config):
    """The fields of open_clip's JSON model configurations.

    `init_logit_scale` is the logarithm of the scale, as there. A caption decoder (`multimodal_cfg`) is not part of a
    dual encoder: its description is accepted and left out.
    """

    embed_dim: PositiveInt
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]
    quick_gelu: bool = False
    custom_text: bool = False
    multimodal_cfg: dict[str, Any] | None = None
    init_logit_scale: float | None = None
    init_logit_bias: float | None = None

    @field_validator("vision_cfg")
    @classmethod
    def _known_vision_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return _checked(fields, CLIPVisionCfg)

    @field_validator("text_cfg")
    @classmethod
    def _known_text_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return _checked(fields, CLIPTextCfg)


class ImageTowerConfig(Config):
    """An image tower: a transformers model (local folder or hub name), or open_clip's `vision_cfg`."""

    transformers: str | None = None
    pool: Literal["pooler", "first", "mean"] = "pooler"
    pretrained: bool = True  # read the transformers model's weights, not its configuration alone
    vision_cfg: dict[str, Any] | None = None

    @field_validator("vision_cfg")
    @classmethod
    def _known_fields(cls, fields: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if fields is None else _checked(fields, CLIPVisionCfg)

    @model_validator(mode="after")
    def _one_kind(self) -> "ImageTowerConfig":
        _exactly_one(transformers=self.transformers, vision_cfg=self.vision_cfg)
        return self


class TextTowerConfig(Config):
    """A text tower: a transformers model (local folder or hub name) with its tokenizer, or open_clip's `text_cfg`.

    `pool` says what becomes the embedding: the mean of the last hidden states, the first, the one at the end token, or
    the model's own pooler.
    """

    transformers: str | None = None
    tokenizer: str | None = None  # by default the one saved with the transformers model
    pool: Literal["mean", "first", "end", "pooler"] = "mean"
    context_length: PositiveInt = 77
    pretrained: bool = True
    text_cfg: dict[str, Any] | None = None

    @field_validator("text_cfg")
    @classmethod
    def _known_fields(cls, fields: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if fields is None else _checked(fields, CLIPTextCfg)

    @model_validator(mode="after")
    def _one_kind(self) -> "TextTowerConfig":
        _exactly_one(transformers=self.transformers, text_cfg=self.text_cfg)
        return self


class Towers(Config):
    """Two towers of any kind, each projected to `embed_dim`."""

    embed_dim: PositiveInt
    image: ImageTowerConfig
    text: TextTowerConfig


class ModelConfig(Config):
    """One dual encoder. Exactly one of `open_clip`, `architecture` and `towers` says what it is made of.

    `pretrained` is a tag that open_clip knows for that model, or the path of a local checkpoint. Fields that are None
    follow the architecture and the pretrained tag. A head stands behind all that these call a tower, its projection to
    the embedding included.
    """

    open_clip: str | None = None
    architecture: Architecture | None = None
    towers: Towers | None = None
    pretrained: str | None = None
    image_head: HeadConfig | None = None
    text_head: HeadConfig | None = None
    freeze_batch_norm: bool = False
    quick_gelu: bool | None = None
    image_size: PositiveInt | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "squash", "longest"] | None = None
    init_logit_scale: float | None = Field(default=None, gt=0, le=MAX_LOGIT_SCALE)  # None: 1/0.07
    init_logit_bias: float | None = None
    learn_logit_scale: bool = True  # false: the scale stays where it starts, or where the pretrained weights have it

    @model_validator(mode="after")
    def _one_kind(self) -> "ModelConfig":
        _exactly_one(open_clip=self.open_clip, architecture=self.architecture, towers=self.towers)
        return self


def _exactly_one(**choices: object) -> None:
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        found = "none of them" if not given else " and ".join(given)
        raise ValueError(f"exactly one of {', '.join(choices)} is needed; found {found}")


@cache
def _validator(owner: type) -> Any:
    return TypeAdapter(owner)


def _checked(fields: dict[str, Any], owner: type) -> dict[str, Any]:
    """The fields, if open_clip's dataclass `owner` has them all, of these types."""
    known = owner.__dataclass_fields__  # type: ignore[attr-defined]
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{name}: unknown key (value {value!r}); {nearest(name, known)}")
    try:
        # None stands for open_clip's own default in its JSON files.
        _validator(owner).validate_python({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"{problem['loc'][0]}: found {problem['input']!r}; {problem['msg']}") from None
    return fields
