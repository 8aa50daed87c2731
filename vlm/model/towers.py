"""What the dual encoder asks of its two towers, and what all towers share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from vlm.model.blocks import most_repeated, repeated_blocks
from vlm.model.image_spec import ImageSpec


class ImageTower(nn.Module):
    """uint8 images to embeddings: normalisation on the device, then the trunk (open_clip, timm or transformers)."""

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: nn.Module, spec: ImageSpec) -> None:
        super().__init__()
        self.trunk = trunk
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Embeddings, not yet of unit norm."""
        pixels = images.to(self.mean.dtype).div(255).sub(self.mean).div(self.std)
        return self.trunk(pixels)  # type: ignore[no-any-return]

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks of the trunk in order, by which it can be locked or sharded; none where none repeat."""
        return repeated_blocks(self.trunk)


class TextTower(nn.Module, ABC):
    """Token ids to embeddings.

    `may_shorten` promises that a batch cut to its longest text gives what the full context length gives; the tokenizer
    follows it. Token ids behind a text's length are padding, whatever their value.
    """

    def __init__(self, context_length: int, pad_id: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.pad_id = pad_id

    @property
    @abstractmethod
    def may_shorten(self) -> bool:
        """Whether texts need no padding beyond the longest of a batch."""

    @abstractmethod
    def forward(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch dim"]:
        """Embeddings, not yet of unit norm."""

    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks in order, by which the tower can be locked or sharded; none where none repeat."""
        return most_repeated(self)

    def padded(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"], length: int
    ) -> Int64[Tensor, "batch {length}"]:
        """The same texts with this tower's padding id behind each, `length` long."""
        ids = tokens.new_full((len(tokens), length), self.pad_id)
        ids[:, : tokens.shape[1]] = tokens
        return ids.masked_fill(torch.arange(length, device=tokens.device) >= lengths[:, None], self.pad_id)
