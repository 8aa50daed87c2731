"""The ways of computing attention: as a recipe names them, and as measurements chose them."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from vlm.config import Config

# torch's fused operator, its steps one after the other, or the faster of both as measurements say.
AttentionChoice = Literal["auto", "fused", "explicit"]
# What a measurement can choose: fused by torch's own rule, or by the kernel that is named.
AttentionWay = Literal["fused", "explicit", "flash", "memory_efficient", "cudnn"]


class AttentionShape(Config):
    """What the speed of attention depends on beside the lengths of rows."""

    device: str
    dtype: str
    heads: PositiveInt
    head_dim: PositiveInt
    is_causal: bool


class MeasuredAttention(Config):
    """The fastest ways of computing attention of one shape and its gradient, by the lengths of rows."""

    shape: AttentionShape
    ways: tuple[tuple[NonNegativeInt, AttentionWay], ...] = Field(
        description="for rows of up to so many tokens, rising; beyond the last, fused"
    )

    def way(self, queries: int, keys: int) -> AttentionWay:
        """The way for so many queries and keys, which are taken for a square of as many pairs."""
        return next((way for length, way in self.ways if queries * keys <= length * length), "fused")
