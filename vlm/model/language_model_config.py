"""A causal language model split in two: a text tower, and a decoder that looks at images (COSMO: Wang et al., 2024)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from vlm.config import Config


class LoraConfig(Config):
    """Low-rank additions to linear maps: W x + alpha / rank B A x, with B = 0 at the start (Hu et al., 2022)."""

    rank: int = Field(default=8, gt=0, le=4096, description="of each addition")
    alpha: int = Field(default=16, gt=0, le=65536, description="additions are multiplied by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of what the additions read")
    targets: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="the linear maps of each layer, by the last part of their names; null: those that turn tokens to "
        "queries and values",
    )


class LanguageModelConfig(Config):
    """The split of the language model that `towers.text.transformers` names.

    Its first layers are the text tower. Of the others every `cross_every`th comes after a block that attends to the
    image, both of whose additions (attention, MLP) are multiplied by tanh(gate); gates begin at 0, so that the logits
    are the language model's own (Flamingo: Alayrac et al., 2022).
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {"lora": ("train", ("lora",))}

    unimodal_layers: int | None = Field(
        default=None, gt=0, le=1023, description="of the text tower; null: half of the layers"
    )
    cross_every: int = Field(default=1, gt=0, le=1024, description="layers of the decoder for each gated block")
    train: Literal["all", "lora", "none"] = Field(
        default="all",
        description="of the language model's own weights, in both halves; lora: additions to them; what is new trains",
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="the additions")
