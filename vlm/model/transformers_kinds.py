"""`transformers:` as a kind of tower: a vision or text model with a projection, or one half of a CLIP or SigLIP."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from vlm.checkpoint.folder import MANIFEST
from vlm.errors import UserError
from vlm.model.causal_models import family_of, sees_all
from vlm.model.clean_configuration import CONFIG, refusing
from vlm.model.foreign import ForeignFiles, TowerName
from vlm.model.language_model_tower import LanguageModelTower, cut
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
from vlm.model.transformers_images import image_preprocessing
from vlm.model.transformers_models import file_as_folder, require_weights
from vlm.model.transformers_towers import TransformersImageTrunk, TransformersTextTower
from vlm.model.weights_file import left_out_words

DEFAULT_CONTEXT_LENGTH = 77
DUAL_ENCODERS = ("clip", "siglip")
"""Dual encoders of which a tower can be a half."""
IMAGE_KEY, TEXT_KEY = "towers.image.transformers", "towers.text.transformers"


class _TransformersConfig(TowerConfig):
    pool: str | None
    transformers: str = Field(description="a model's local folder, or its name on the hub")
    pretrained: bool = Field(
        default=True, description="read the weights that the model's name stands for, not its shape alone"
    )

    @property
    def title(self) -> str:
        return f"transformers: {self.transformers}"

    @property
    def weights_file(self) -> str | None:
        return self.weights if self.weights is not None and os.path.isfile(Path(self.weights) / MANIFEST) else None

    @property
    def reads_model(self) -> bool:
        """Whether the library reads the model's weights when the tower is built."""
        return self.weights_file is None and (self.pretrained or self.weights is not None)

    def _place(self, tower_name: TowerName) -> tuple[str, str]:
        """The key and the name of what the weights are read from."""
        named = (f"towers.{tower_name}.transformers", self.transformers)
        return named if self.weights is None else (f"towers.{tower_name}.weights", self.weights)

    def _load(
        self, configuration: PreTrainedConfig, context: TowerContext, tower_name: TowerName, cls: Any = AutoModel
    ) -> tuple[Any, set[int]]:
        """The model, and the identities of its parameters without weights; what is left out becomes a notice."""
        if self.weights is None or not self.reads_model:
            return context.models.load(self.transformers, configuration, pretrained=self.reads_model, cls=cls)
        left_out: list[str] = []
        if os.path.isdir(self.weights):
            loaded = context.models.load(self.weights, configuration, pretrained=True, cls=cls, left_out=left_out)
        elif not os.path.isfile(self.weights):
            raise UserError("no such file or folder")
        elif self.pool == "own":
            raise UserError(f"one half of a CLIP or SigLIP is read from a folder with its {CONFIG}")
        else:
            with file_as_folder(Path(self.weights)) as folder:
                loaded = context.models.load(str(folder), configuration, pretrained=True, cls=cls, left_out=left_out)
        context.files.notices += left_out_words(" ".join(self._place(tower_name)), left_out)
        return loaded

    def without_weights(self: Kind) -> Kind:
        return self.model_copy(update={"weights": None, "pretrained": False})


@IMAGE_TOWERS.register("transformers")
class TransformersImageConfig(_TransformersConfig, ImageTowerConfig):
    """A transformers vision model, or the image half of its CLIP or SigLIP."""

    pool: Literal["own", "pooler", "first", "mean"] | None = Field(
        default=None,
        description="what is projected to the embedding; own: the image half of a CLIP or SigLIP, with its projection; "
        "null: own for these, else pooler",
    )

    def resolved(self, embed_dim: int, image_size: int | None, files: ForeignFiles) -> ImageTowerConfig:  # noqa: ARG002
        """With pooling written out. Raises UserError for a half whose projection has another width."""
        if self.pool is not None:
            return self
        with refusing(IMAGE_KEY, self.transformers):
            configuration = files.configuration("image", self.transformers)
            pool = _default_pool("image", configuration)
            if pool == "own":
                _require_dim("image", embed_dim, configuration, self.transformers)
            return self.model_copy(update={"pool": pool})

    def images(self, files: ForeignFiles) -> dict[str, Any]:
        """The images that the vision model was made for; what cannot be said of them becomes a notice.

        Raises UserError for a CLIP or SigLIP whose images cannot be described.
        """
        name = self.transformers
        with refusing(IMAGE_KEY, name):
            configuration = files.configuration("image", name)
            size = getattr(getattr(configuration, "vision_config", configuration), "image_size", None)
            if isinstance(size, list | tuple) and len(set(size)) == 1:
                size = size[0]
            if size is not None and not isinstance(size, int):
                raise UserError(f"image_size {size}; images must be square")
            spec, departures = image_preprocessing(files.image_processor(name), configuration.model_type, size)
            if departures and self.pool == "own":
                raise UserError(
                    f"its image processor cannot be followed ({departures[0]}); say image_size, image_mean, image_std, "
                    "interpolation and resize_mode to do it another way"
                )
        files.notices += [f"{name}: of its image processor, {departure}" for departure in departures]
        return spec.model_dump()

    def build(self, context: TowerContext) -> nn.Module:
        """The vision model, pooled and projected. Raises UserError when it cannot be loaded or does not fit."""
        with refusing(*self._place("image")):
            configuration = context.files.configuration("image", self.transformers)
            vision_config = getattr(configuration, "vision_config", configuration)
            if hasattr(vision_config, "image_size"):
                vision_config.image_size = context.image_size
            model, missing = self._load(configuration, context, "image")
            vision, place = getattr(model, "vision_model", model), (context.image_size, context.embed_dim)
            if self.pool == "own":
                projection = getattr(model, "visual_projection", nn.Identity())
                trunk = TransformersImageTrunk(vision, "pooler", *place, projection)
            else:
                trunk = TransformersImageTrunk(vision, self.pool or "pooler", *place)
            require_weights(trunk, missing)
            return trunk


@TEXT_TOWERS.register("transformers")
class TransformersTextConfig(_TransformersConfig, TextTowerConfig):
    """A transformers text model with its tokenizer, or the text half of its CLIP or SigLIP.

    `pool` says what is projected to the embedding: the mean of the last hidden states, the first, the one at the end
    token, or the model's pooler; `own` is the text half of a CLIP or SigLIP, with its projection. `query` is a learned
    query that attends to the states of the text's tokens, `class` a learned token behind them, of causal models.
    """

    tokenizer: str | None = Field(default=None, description="null: the one saved with the transformers model")
    pool: Literal["own", "mean", "first", "end", "pooler", "query", "class"] | None = Field(
        default=None, description="what is projected to the embedding; null: own for a CLIP or SigLIP, else mean"
    )
    context_length: int | None = Field(
        default=None,
        ge=2,
        le=65536,
        description="tokens that a text is cut to; null: as many as a CLIP or SigLIP has positions, else 77",
    )

    def resolved(self, embed_dim: int, files: ForeignFiles) -> TextTowerConfig:
        """With pooling and context length written out. Raises UserError for a half of another width."""
        if self.pool is not None and self.context_length is not None:
            return self
        with refusing(TEXT_KEY, self.transformers):
            configuration = files.configuration("text", self.transformers)
            pool = self.pool or _default_pool("text", configuration)
            if pool == "own":
                _require_dim("text", embed_dim, configuration, self.transformers)
            context_length = self.context_length or _default_context_length(configuration)
            return self.model_copy(update={"pool": pool, "context_length": context_length})

    def tokenizer_fields(self) -> dict[str, Any]:
        """The tokenizer that is named, or the model's own."""
        return {"hf_tokenizer_name": self.tokenizer or self.transformers, "context_length": self.context_length}

    @property
    def brings_vocabulary(self) -> bool:
        """Always: its embeddings are of its own tokens."""
        return True

    def build(self, context: TowerContext, tokenizer: Tokenizer) -> TextTower:
        """The text model, pooled and projected. Raises UserError when it cannot be loaded or does not fit."""
        assert self.context_length is not None
        with refusing(*self._place("text")):
            configuration = context.files.configuration("text", self.transformers)
            if context.split is not None or self.pool == "class":
                return self._language_model(configuration, context, tokenizer.pad_id)
            model, missing = self._load(configuration, context, "text")
            if getattr(configuration, "is_encoder_decoder", False):
                model = model.get_encoder()
            text = getattr(model, "text_model", model)
            place = (self.context_length, tokenizer.pad_id, context.embed_dim)
            if self.pool == "own":
                tower = TransformersTextTower(text, "pooler", *place, getattr(model, "text_projection", nn.Identity()))
            else:
                tower = TransformersTextTower(text, self.pool or "mean", *place)
            require_weights(tower, missing)
            return tower

    def _language_model(
        self, configuration: PreTrainedConfig, context: TowerContext, pad_id: int
    ) -> LanguageModelTower:
        """A causal language model, or what a decoder leaves of it."""
        assert self.context_length is not None
        family_of(configuration)
        pool, split = self.pool or "mean", context.split
        if pool in ("own", "pooler"):
            raise UserError(f"pool: found {pool}; a language model has query, class, mean, end or first")
        if split is not None and self.weights_file is not None:
            raise UserError("a checkpoint's text tower has not all layers of a language model; model.pretrained has")
        num_places = self.context_length + (pool == "class")
        if not sees_all(configuration, num_places) or num_places > configuration.max_position_embeddings:
            raise UserError(f"context_length: found {self.context_length}; the model reads no texts of that length")
        cls = AutoModel if split is None else AutoModelForCausalLM
        model, missing = self._load(configuration, context, "text", cls)
        require_weights(model, missing)
        upper = None if split is None else cut(model, split.unimodal_layers)
        place = (self.context_length, pad_id, context.embed_dim)
        return LanguageModelTower(model if split is None else model.base_model, pool, *place, upper)


def _default_pool(tower_name: TowerName, configuration: PreTrainedConfig) -> str:
    kind = configuration.model_type
    if kind in DUAL_ENCODERS:
        return "own"
    left_out = next((one for one in configuration.architectures or () if str(one).endswith("WithProjection")), None)
    if left_out is None and not hasattr(configuration, "text_config"):
        return "pooler" if tower_name == "image" or kind == "siglip_text_model" else "mean"
    raise UserError(
        f"{left_out or kind} has a projection that is not read (whole are read: {', '.join(DUAL_ENCODERS)}); say a "
        f"pool to take its {tower_name} model with a new projection"
    )


def _default_context_length(configuration: PreTrainedConfig) -> int:
    text = getattr(configuration, "text_config", configuration)
    if configuration.model_type in DUAL_ENCODERS or text.model_type == "siglip_text_model":
        return int(text.max_position_embeddings)
    return DEFAULT_CONTEXT_LENGTH


def _require_dim(tower_name: TowerName, embed_dim: int, configuration: PreTrainedConfig, name: str) -> None:
    dim = projection_dim(configuration, tower_name)
    if dim != embed_dim:
        raise UserError(
            f"towers.embed_dim: found {embed_dim}, but the {tower_name} half of {name} has a projection to {dim}; "
            f"say towers.{tower_name}.pool to take its {tower_name} model with a new projection"
        )


def projection_dim(configuration: PreTrainedConfig, tower_name: TowerName) -> int:
    """The width to which one half of a CLIP or SigLIP projects."""
    if configuration.model_type == "clip":
        return int(configuration.projection_dim)
    if tower_name == "image":
        return int(configuration.vision_config.hidden_size)
    return int(configuration.text_config.projection_size)
