"""Kinds of tower of open_clip: a tower of a named model, one by its fields, and timm's models behind its adapter."""

from typing import Annotated, Any

import open_clip
import timm
from open_clip.model import CLIPVisionCfg
from pydantic import AfterValidator, Field, model_validator
from torch import nn

from vlm.errors import UserError, nearest
from vlm.model.foreign import ForeignFiles
from vlm.model.open_clip_fields import checked_fields, checked_text_fields, open_clip_name
from vlm.model.open_clip_towers import build_image_trunk, build_text_tower
from vlm.model.tokenizer import Tokenizer
from vlm.model.tower_config import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    ImageTowerConfig,
    Kind,
    TextTowerConfig,
    TowerConfig,
    TowerContext,
)
from vlm.model.towers import TextTower

_DEFAULT_IMAGE_SIZE = 224
_KEYS_OF_TRANSFORMERS = ("pretrained", "pool", "tokenizer", "context_length")
_INTERPOLATIONS = ("bicubic", "bilinear")


def _known_fields_of(known: type) -> AfterValidator:
    """The check that a mapping has fields of this class of open_clip only."""
    return AfterValidator(lambda fields: checked_fields(fields, known))


class _FieldsConfig(TowerConfig):
    quick_gelu: bool | None = Field(
        default=None, description="OpenAI's approximation of GELU in this tower; null: as the model has it"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_others_keys(cls, values: Any) -> Any:
        """Earlier versions had the keys of all kinds in one, and wrote them out beside fields of open_clip."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if key not in _KEYS_OF_TRANSFORMERS}


@IMAGE_TOWERS.register("vision_cfg")
class OpenClipImageConfig(_FieldsConfig, ImageTowerConfig):
    """An image tower by the fields of open_clip's `vision_cfg`."""

    vision_cfg: Annotated[dict[str, Any], _known_fields_of(CLIPVisionCfg)] = Field(
        description="open_clip's CLIPVisionCfg"
    )

    @property
    def title(self) -> str:
        """timm's name of the model, or that it is a ViT."""
        return str(self.vision_cfg.get("timm_model_name") or "ViT")

    def without_weights(self: Kind) -> Kind:
        """The same tower; timm reads no weights either."""
        assert isinstance(self, OpenClipImageConfig)
        fields = {**self.vision_cfg, "timm_model_pretrained": False}
        return self.model_copy(update={"weights": None, "vision_cfg": fields})

    def resolved(self, embed_dim: int, image_size: int | None, files: ForeignFiles) -> ImageTowerConfig:  # noqa: ARG002
        """With the side of its images written out. Raises UserError where they are not square."""
        size = image_size or self.vision_cfg.get("image_size", _DEFAULT_IMAGE_SIZE)
        if not isinstance(size, int):
            if len(set(size)) != 1:
                raise UserError(f"vision_cfg.image_size: found {size}; images must be square")
            size = size[0]
        return self.model_copy(update={"vision_cfg": {**self.vision_cfg, "image_size": size}})

    def images(self, files: ForeignFiles) -> dict[str, Any]:  # noqa: ARG002
        """The side of its images."""
        return {"size": self.vision_cfg["image_size"]}

    def build(self, context: TowerContext) -> nn.Module:
        """open_clip's image tower. Raises UserError when it is impossible."""
        quick_gelu = context.quick_gelu if self.quick_gelu is None else self.quick_gelu
        fields = self.vision_cfg if self.weights is None else {**self.vision_cfg, "timm_model_pretrained": False}
        return build_image_trunk(context.embed_dim, fields, quick_gelu=quick_gelu)


@IMAGE_TOWERS.register("open_clip")
class NamedImageConfig(ImageTowerConfig):
    """The image tower of a model that open_clip knows by name, with fresh weights or those of a file."""

    open_clip: str = Field(description="a model by its open_clip name, of which this tower is taken")

    def resolved(self, embed_dim: int, image_size: int | None, files: ForeignFiles) -> ImageTowerConfig:
        """The same tower by its fields. Raises UserError for an unknown name."""
        fields = _fields_of(self.open_clip, "image")
        vision_cfg = {**fields["vision_cfg"], "output_tokens": False, "timm_model_pretrained": False}
        tower = OpenClipImageConfig(vision_cfg=vision_cfg, quick_gelu=fields.get("quick_gelu"), weights=self.weights)
        return tower.resolved(embed_dim, image_size, files)

    def build(self, context: TowerContext) -> nn.Module:
        """The tower by its fields."""
        return self.resolved(context.embed_dim, context.image_size, context.files).build(context)


@IMAGE_TOWERS.register("timm")
class TimmImageConfig(ImageTowerConfig):
    """An image model of timm, without its classifier, with a new projection to the embedding."""

    timm: str = Field(description="a model by timm's name")
    pool: str | None = Field(default=None, description="how timm pools features; null: as the model does")
    pretrained: bool = Field(default=False, description="let timm download the model's weights")

    def resolved(self, embed_dim: int, image_size: int | None, files: ForeignFiles) -> ImageTowerConfig:  # noqa: ARG002
        """The same tower by open_clip's fields of timm's models. Raises UserError for an unknown name."""
        size = image_size or self._stated().get("input_size", (3, _DEFAULT_IMAGE_SIZE))[-1]
        fields = {
            "timm_model_name": self.timm,
            "timm_model_pretrained": self.pretrained and self.weights is None,
            "timm_pool": self.pool or "",
            "timm_proj": "linear",
            "image_size": size,
        }
        return OpenClipImageConfig(vision_cfg=fields, weights=self.weights)

    def images(self, files: ForeignFiles) -> dict[str, Any]:  # noqa: ARG002
        """Normalisation and interpolation that timm's weights of this name were trained with."""
        stated = self._stated()
        named: dict[str, Any] = {name: tuple(stated[name]) for name in ("mean", "std") if name in stated}
        interpolation = stated.get("interpolation")
        return {**named, "interpolation": interpolation} if interpolation in _INTERPOLATIONS else named

    def without_weights(self: Kind) -> Kind:
        """The same tower; timm reads no weights either."""
        return self.model_copy(update={"weights": None, "pretrained": False})

    def build(self, context: TowerContext) -> nn.Module:
        """timm's model in open_clip's adapter."""
        return self.resolved(context.embed_dim, context.image_size, context.files).build(context)

    def _stated(self) -> dict[str, Any]:
        """timm's record of the model, which needs no download."""
        if not timm.is_model(self.timm):
            known = timm.list_models()
            raise UserError(f"towers.image.timm: there is no model {self.timm!r:.80}; {nearest(self.timm, known)}")
        record = timm.get_pretrained_cfg(self.timm)
        return {} if record is None else record.to_dict()


@TEXT_TOWERS.register("text_cfg")
class OpenClipTextConfig(_FieldsConfig, TextTowerConfig):
    """A text tower by the fields of open_clip's `text_cfg`."""

    text_cfg: Annotated[dict[str, Any], AfterValidator(checked_text_fields)] = Field(
        description="open_clip's CLIPTextCfg, and `correct_cls_mask`"
    )

    @property
    def title(self) -> str:
        """The Hugging Face model, or that it is a transformer."""
        return str(self.text_cfg.get("hf_model_name") or "transformer")

    @property
    def brings_vocabulary(self) -> bool:
        """Whether it is a Hugging Face model."""
        return bool(self.text_cfg.get("hf_model_name"))

    def without_weights(self: Kind) -> Kind:
        """The same tower; a Hugging Face model reads no weights either."""
        assert isinstance(self, OpenClipTextConfig)
        fields = {**self.text_cfg, "hf_model_pretrained": False}
        return self.model_copy(update={"weights": None, "text_cfg": fields})

    def tokenizer_fields(self) -> dict[str, Any]:
        """The tokenizer that open_clip pairs with the tower."""
        return self.text_cfg

    def build(self, context: TowerContext, tokenizer: Tokenizer) -> TextTower:
        """open_clip's text tower. Raises UserError when it is impossible."""
        quick_gelu = context.quick_gelu if self.quick_gelu is None else self.quick_gelu
        fields = self.text_cfg if self.weights is None else {**self.text_cfg, "hf_model_pretrained": False}
        return build_text_tower(context.embed_dim, fields, tokenizer, quick_gelu=quick_gelu, files=context.files)


@TEXT_TOWERS.register("open_clip")
class NamedTextConfig(TextTowerConfig):
    """The text tower of a model that open_clip knows by name, with its tokenizer."""

    open_clip: str = Field(description="a model by its open_clip name, of which this tower is taken")

    def resolved(self, embed_dim: int, files: ForeignFiles) -> TextTowerConfig:
        """The same tower by its fields. Raises UserError for an unknown name."""
        fields = _fields_of(self.open_clip, "text")
        text_cfg = {**fields["text_cfg"], "output_tokens": False}
        tower = OpenClipTextConfig(text_cfg=text_cfg, quick_gelu=fields.get("quick_gelu"), weights=self.weights)
        return tower.resolved(embed_dim, files)

    def tokenizer_fields(self) -> dict[str, Any]:
        """The tokenizer that open_clip pairs with the tower."""
        return dict(_fields_of(self.open_clip, "text")["text_cfg"])

    def build(self, context: TowerContext, tokenizer: Tokenizer) -> TextTower:
        """The tower by its fields."""
        return self.resolved(context.embed_dim, context.files).build(context, tokenizer)


def _fields_of(name: str, tower_name: str) -> dict[str, Any]:
    known = open_clip.list_models()
    plain = open_clip_name(name)
    if plain not in known:
        raise UserError(f"towers.{tower_name}.open_clip: unknown model {name!r:.80}; {nearest(plain, known)}")
    return dict(open_clip.get_model_config(plain))
