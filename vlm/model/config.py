"""Which dual encoder to build: by open_clip name, by an inline architecture, or from transformers models."""

from typing import Annotated, Any, Literal

from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPVisionCfg
from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, field_validator, model_validator

from vlm.config import Config
from vlm.errors import EveryRankError
from vlm.model import joined_kinds, open_clip_kinds, transformers_kinds  # noqa: F401 (each registers its kinds of tower)
from vlm.model.captioner_config import CaptionerConfig
from vlm.model.heads import HeadConfig
from vlm.model.image_spec import ImageSize, Interpolation, Mean, ResizeMode, Std
from vlm.model.lock import LockConfig
from vlm.model.logit_scale import MAX_LOGIT_SCALE
from vlm.model.open_clip_fields import checked_fields, checked_text_fields
from vlm.model.tower_config import (
    IMAGE_TOWERS,
    TEXT_TOWERS,
    ImageTowerConfig,
    TextTowerConfig,
    tower_reader,
    tower_schema,
    write_tower,
)

EmbedDim = Annotated[int, Field(gt=0, le=65536, description="width of the embeddings that are compared")]
LogitBias = Annotated[float, Field(ge=-1000, le=1000)]


class Architecture(Config):
    """The fields of open_clip's JSON model configurations.

    `init_logit_scale` is the logarithm of the scale, as there. `multimodal_cfg` is the model's captioning decoder,
    unless `model.captioner` says otherwise.
    """

    embed_dim: EmbedDim
    vision_cfg: dict[str, Any] = Field(description="the image tower: open_clip's CLIPVisionCfg")
    text_cfg: dict[str, Any] = Field(description="the text tower: open_clip's CLIPTextCfg")
    quick_gelu: bool = Field(default=False, description="OpenAI's approximation of GELU")
    custom_text: bool = Field(
        default=False, description="of no effect here: the text tower is always a part of its own"
    )
    multimodal_cfg: dict[str, Any] | None = Field(
        default=None, description="the captioning decoder: open_clip's MultimodalCfg"
    )
    init_logit_scale: float | None = Field(
        default=None, ge=-10, le=10, description="logarithm of the first logit scale; null: that of 1/0.07"
    )
    init_logit_bias: LogitBias | None = Field(default=None, description="first logit bias; null: the model has none")

    @field_validator("vision_cfg")
    @classmethod
    def _known_vision_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return checked_fields(fields, CLIPVisionCfg)

    @field_validator("text_cfg")
    @classmethod
    def _known_text_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return checked_text_fields(fields)

    @field_validator("multimodal_cfg")
    @classmethod
    def _known_decoder_fields(cls, fields: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if fields is None else checked_fields(fields, MultimodalCfg)

    @model_validator(mode="after")
    def _one_vocabulary(self) -> "Architecture":
        sizes = [fields.get("vocab_size", 49408) for fields in (self.text_cfg, self.multimodal_cfg or self.text_cfg)]
        if sizes[0] != sizes[1] and not self.text_cfg.get("hf_model_name"):
            raise ValueError(
                f"multimodal_cfg.vocab_size: found {sizes[1]}; the text tower's vocabulary has {sizes[0]} tokens, and "
                "the decoder tells the same"
            )
        return self


ImageTowerChoice = Annotated[
    ImageTowerConfig,
    BeforeValidator(tower_reader(IMAGE_TOWERS)),
    PlainSerializer(write_tower),
    WithJsonSchema(tower_schema(IMAGE_TOWERS)),
]
TextTowerChoice = Annotated[
    TextTowerConfig,
    BeforeValidator(tower_reader(TEXT_TOWERS)),
    PlainSerializer(write_tower),
    WithJsonSchema(tower_schema(TEXT_TOWERS)),
]


class Towers(Config):
    """Two towers of any kind, each projected to `embed_dim`."""

    embed_dim: EmbedDim
    image: ImageTowerChoice = Field(
        description="the image tower: one of transformers, open_clip, timm, vision_cfg, joined, with its options"
    )
    text: TextTowerChoice = Field(
        description="the text tower: one of transformers, open_clip, text_cfg, joined, with its options"
    )


class ModelConfig(Config):
    """One dual encoder. Exactly one of `open_clip`, `architecture`, `transformers` and `towers` says what it is.

    `pretrained` is a tag that open_clip knows for that model, or the path of a local checkpoint or run. Fields that are
    None follow the model and what stands beside its pretrained weights. A head stands behind all that these call a
    tower, its projection to the embedding included.
    """

    open_clip: str | None = Field(default=None, description="a model by its open_clip name")
    architecture: Architecture | None = Field(default=None, description="the fields of open_clip's JSON model files")
    transformers: str | None = Field(
        default=None,
        description="a CLIP or SigLIP of transformers, whole (towers, projections, scale, bias, images): its local "
        "folder, or its name on the hub",
    )
    towers: Towers | None = Field(default=None, description="two towers of any kind")
    pretrained: str | None = Field(
        default=None, description="open_clip's tag, or a local checkpoint or run; null: from scratch"
    )
    image_head: HeadConfig | None = Field(default=None, description="a projection head behind the image tower")
    text_head: HeadConfig | None = Field(default=None, description="a projection head behind the text tower")
    captioner: Literal["none"] | CaptionerConfig | None = Field(
        default=None,
        description="a captioning decoder behind a causal text tower; null: that of the architecture, if it has one; "
        "none: none",
    )
    lock: LockConfig = Field(default=LockConfig(), description="towers whose weights stay as they are")
    freeze_batch_norm: bool = Field(
        default=False, description="keep the statistics of batch norm as they are; those of a tower locked whole are"
    )
    quick_gelu: bool | None = Field(default=None, description="OpenAI's approximation of GELU")
    image_size: ImageSize | None = Field(default=None, description="pixels a side")
    image_mean: tuple[Mean, Mean, Mean] | None = Field(default=None, description="subtracted from values in [0, 1]")
    image_std: tuple[Std, Std, Std] | None = Field(default=None, description="by which they are divided then")
    interpolation: Interpolation | None = Field(default=None, description="how images are resized")
    resize_mode: ResizeMode | None = Field(default=None, description="which side gets the size in evaluation")
    init_logit_scale: float | None = Field(
        default=None, gt=0, le=MAX_LOGIT_SCALE, description="first logit scale; null: the model's, else 1/0.07"
    )
    init_logit_bias: LogitBias | None = Field(default=None, description="first logit bias, as `sigmoid` needs it")
    learn_logit_scale: bool = Field(
        default=True, description="false: the scale stays where it starts, or where the pretrained weights have it"
    )

    @model_validator(mode="before")
    @classmethod
    def _both_towers(cls, values: Any) -> Any:
        """`towers: {transformers: NAME}` is another way to write `transformers: NAME`."""
        towers = values.get("towers") if isinstance(values, dict) else None
        if isinstance(towers, dict) and set(towers) == {"transformers"} and values.get("transformers") is None:
            return {**values, "towers": None, "transformers": towers["transformers"]}
        return values

    @model_validator(mode="after")
    def _one_kind(self) -> "ModelConfig":
        _exactly_one(
            open_clip=self.open_clip,
            architecture=self.architecture,
            transformers=self.transformers,
            towers=self.towers,
        )
        for name in ("image", "text"):
            if self.pretrained is not None and self.towers is not None and getattr(self.towers, name).weights:
                raise ValueError(f"found pretrained and towers.{name}.weights; one of them says where weights are")
        return self

    @property
    def tower_dim(self) -> int:
        """The width of what the towers make, before any head, of a configuration whose towers are written out."""
        towers = self.architecture or self.towers
        assert towers is not None
        return towers.embed_dim

    @property
    def embed_dim(self) -> int:
        """The width of an embedding of either modality. Raises EveryRankError for heads of unequal width."""
        dims = {}
        for name, head in (("image_head", self.image_head), ("text_head", self.text_head)):
            try:
                dims[name] = self.tower_dim if head is None else head.embed_dim(self.tower_dim)
            except ValueError as error:
                raise EveryRankError(f"model.{name}: {error}") from None
        image, text = dims.values()
        if image != text:
            raise EveryRankError(f"model: image_head makes {image} dimensions, text_head {text}; they must be as many")
        return image


def _exactly_one(**choices: object) -> None:
    given = [name for name, value in choices.items() if value is not None]
    if len(given) != 1:
        given_words = "none of them" if not given else " and ".join(given)
        raise ValueError(f"exactly one of {', '.join(choices)} is needed; found {given_words}")
