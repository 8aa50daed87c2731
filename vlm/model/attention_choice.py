"""The ways of computing attention, by name."""

from typing import Literal

# torch's fused operator, its steps one after the other, or the faster of both as measurements say.
AttentionChoice = Literal["auto", "fused", "explicit"]
