"""What a training step eats."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Skip:
    """One sample that could not be used, and the one that took its place."""

    source: str
    shard: str
    key: str
    reason: str
    substitute: str


@dataclass(frozen=True)
class Batch:
    """The rows of one global batch that one rank trains on.

    `tokens` is as long as the longest caption among these rows; shorter ones are padded behind their `lengths`.
    """

    step: int
    images: UInt8[Tensor, "batch 3 height width"]
    tokens: Int64[Tensor, "batch length"]
    lengths: Int64[Tensor, " batch"]
    sample_ids: Int64[Tensor, " batch"]
    keys: tuple[str, ...]
    labels: Int64[Tensor, " batch"] | None = None
    skipped: tuple[Skip, ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """The same rows on `device`; copies from pinned memory run asynchronously."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )
