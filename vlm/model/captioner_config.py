"""The captioning decoder of a recipe's model: its sizes, and how images reach it (CoCa: Yu et al., 2022)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from vlm.config import Config
from vlm.model.language_model_config import LanguageModelConfig
from vlm.paths import LocalPath

Pooler = Literal["cascade", "parallel", "single", "tower", "embedding"]
Preset = Literal["tiny", "base", "large", "2b"]

# Of the paper's table 1, the decoder's half; the text tower is the other.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"layers": 2, "width": 128, "heads": 4, "queries": 16, "pooler_heads": 4},
    "base": {"layers": 12, "width": 768, "heads": 12, "queries": 256, "pooler_heads": 12},
    "large": {"layers": 12, "width": 1024, "heads": 16, "queries": 256, "pooler_heads": 16},
    "2b": {"layers": 18, "width": 1408, "heads": 16, "queries": 256, "pooler_heads": 16},
}

_EMBEDDING_TOKENS = 4  # of CLOSE


class GapConfig(Config):
    """The way of a text's embedding to where images are, so that a decoder may train on texts (CLOSE: Gu et al., 2022).

    In training t becomes (t + shift + noise N(0, I)) / its norm, t being of unit norm: in d dimensions the noise is
    about noise sqrt(d) long. mean: the shift is the mean difference of images and texts. covariance: it is drawn from
    the Gaussian with mean and covariance of the differences of pairs. In evaluation nothing is drawn.
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        "spread": ("correction", ("covariance",)),
        "statistics": ("correction", ("mean", "covariance")),
    }

    noise: float = Field(default=0.04, ge=0, le=100, description="standard deviation in each dimension; 0: none")
    correction: Literal["none", "mean", "covariance"] = Field(
        default="none", description="the shift from texts to images, out of `statistics`"
    )
    spread: float = Field(
        default=1.0, gt=0, le=100, description="factor of what is drawn about the mean difference (the authors' has 3)"
    )
    statistics: LocalPath | None = Field(
        default=None,
        description="file of `vlm gap`: what images and texts of this model differ by; checkpoints keep it",
    )


class CaptionerConfig(Config):
    """A decoder behind a causal text tower, which reads its token states, looks at the image, and tells what follows.

    cascade: `queries` learned queries attend to the image's tokens for the decoder, and one more to what these made for
    the embedding. parallel: that one attends to the tokens too. single: one set of queries, whose first is the
    embedding. tower: the image tower keeps its embedding, and the decoder looks at the tower's own tokens. embedding:
    it looks at the embedding itself, behind any head, as a linear map makes `queries` tokens of it (4 by default); a
    text's embedding may stand in for it (`gap`). A language model that is split brings the decoder's layers; `heads`
    and `mlp_ratio` are then those of its gated blocks.
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        "gap": ("pooler", ("embedding",)),
        "feature_map": ("pooler", (None, "cascade", "parallel", "single", "tower")),
    }

    language_model: LanguageModelConfig | None = Field(
        default=None,
        description="the text tower is the first layers of a causal language model, and the decoder the others with "
        "gated cross-attention; null: a decoder of its own",
    )

    preset: Preset | None = Field(default=None, description="CoCa's sizes; keys that are written beside go first")
    pooler: Pooler | None = Field(
        default=None,
        description="how the image's tokens reach embedding and decoder; null: cascade, or tower for an image tower "
        "that pools by attention itself",
    )
    feature_map: int | None = Field(
        default=None,
        ge=-64,
        lt=64,
        description="of a timm trunk's list of feature maps, the one that becomes the image's tokens; -2: the last but "
        "one, usually twice as fine; null: what the trunk pools",
    )
    queries: int = Field(
        default=256, gt=0, le=65536, description="learned queries for the decoder; of an embedding, its tokens"
    )
    pooler_heads: int = Field(default=8, gt=0, le=1024, description="attention heads of the poolers")
    layers: int = Field(default=12, gt=0, le=1024, description="pairs of a self-attention and a cross-attention block")
    width: int | None = Field(
        default=None, gt=0, le=65536, description="of the decoder; null: that of the text tower's token states"
    )
    heads: int = Field(default=8, gt=0, le=1024, description="attention heads of the decoder")
    mlp_ratio: float = Field(default=4.0, gt=0, le=64, description="hidden width of an MLP over that of the decoder")
    layer_scale: float | None = Field(
        default=None, gt=0, le=10, description="first factor of each block's two additions; null: none"
    )
    gap: GapConfig | None = Field(
        default=None, description="how texts' embeddings come to stand in for images'; null: as they are"
    )

    @model_validator(mode="after")
    def _layers_of_one_kind(self) -> "CaptionerConfig":
        if self.language_model is not None:
            for name in ("preset", "layers", "width", "layer_scale"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: found {value}, which the language model (language_model) brings itself")
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        named, is_embedding = values.get("preset"), values.get("pooler") == "embedding"
        preset = PRESETS[named] if isinstance(named, str) and named in PRESETS else {}
        return {**preset, **({"queries": _EMBEDDING_TOKENS} if is_embedding else {}), **values}

    def without_files(self) -> "CaptionerConfig":
        """The configuration of the same decoder, which reads no statistics: a checkpoint has them."""
        gap = None if self.gap is None else self.gap.model_copy(update={"statistics": None})
        return self.model_copy(update={"gap": gap})
