"""The captioning decoder of a recipe's model: its sizes, and how images reach it (CoCa: Yu et al., 2022)."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from vlm.config import Config

Pooler = Literal["cascade", "parallel", "single", "tower"]
Preset = Literal["tiny", "base", "large", "2b"]

# Of the paper's table 1, the decoder's half; the text tower is the other.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"layers": 2, "width": 128, "heads": 4, "queries": 16, "pooler_heads": 4},
    "base": {"layers": 12, "width": 768, "heads": 12, "queries": 256, "pooler_heads": 12},
    "large": {"layers": 12, "width": 1024, "heads": 16, "queries": 256, "pooler_heads": 16},
    "2b": {"layers": 18, "width": 1408, "heads": 16, "mlp_ratio": 4.3637, "queries": 256, "pooler_heads": 16},
}


class CaptionerConfig(Config):
    """A decoder behind a causal text tower, which reads its token states, looks at the image, and tells what follows.

    cascade: `queries` learned queries attend to the image's tokens for the decoder, and one more to what these made for
    the embedding. parallel: that one attends to the tokens too. single: one set of queries, whose first is the
    embedding. tower: the image tower keeps its embedding, and the decoder looks at the tower's own tokens.
    """

    preset: Preset | None = Field(default=None, description="CoCa's sizes; keys that are written beside go first")
    pooler: Pooler | None = Field(
        default=None,
        description="how the image's tokens reach embedding and decoder; null: cascade, or tower for an image tower "
        "that pools by attention itself",
    )
    queries: int = Field(default=256, gt=0, le=65536, description="learned queries for the decoder")
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

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: Any) -> Any:
        named = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS[named], **values} if isinstance(named, str) and named in PRESETS else values
