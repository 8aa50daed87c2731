"""What a training step eats."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

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


class AllCaptions(NamedTuple):
    """Every caption of every sample of a batch: row m is a caption of image `rows[m]`, its first the one trained on."""

    tokens: Int64[Tensor, "captions length"]
    lengths: Int64[Tensor, " captions"]
    rows: Int64[Tensor, " captions"]


@dataclass(frozen=True)
class Batch:
    """The rows of one global batch that one rank trains on.

    `tokens` is as long as the longest caption among these rows; shorter ones are padded behind their `lengths`.
    `captions` is there when the caption policy gives several positives. `counts` says how many rows are of each source
    and how many captions of each field.
    """

    step: int
    images: UInt8[Tensor, "batch 3 height width"]
    tokens: Int64[Tensor, "batch length"]
    lengths: Int64[Tensor, " batch"]
    sample_ids: Int64[Tensor, " batch"]
    keys: tuple[str, ...]
    labels: Int64[Tensor, " batch"] | None = None
    skipped: tuple[Skip, ...] = ()
    captions: AllCaptions | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    def part(self, start: int, stop: int) -> "Batch":
        """Rows `start` to `stop` of these, with their captions; what was skipped and counted stays with the whole."""
        rows = slice(start, stop)
        captions = None
        if self.captions is not None:
            inside = (self.captions.rows >= start) & (self.captions.rows < stop)
            tokens, lengths, owners = (part[inside] for part in self.captions)
            captions = AllCaptions(tokens, lengths, owners - start)
        return replace(
            self,
            images=self.images[rows],
            tokens=self.tokens[rows],
            lengths=self.lengths[rows],
            sample_ids=self.sample_ids[rows],
            keys=self.keys[rows],
            labels=None if self.labels is None else self.labels[rows],
            skipped=(),
            captions=captions,
            counts={},
        )

    def to(self, device: torch.device) -> "Batch":
        """The same rows on `device`; copies from pinned memory run asynchronously."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            tokens=self.tokens.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            sample_ids=self.sample_ids.to(device, non_blocking=True),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
            captions=None
            if self.captions is None
            else AllCaptions(*(part.to(device, non_blocking=True) for part in self.captions)),
        )
