"""The contracts of the two towers of a dual encoder, and the base that they share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional

from vlm.model.blocks import most_repeated, repeated_blocks, repeated_stacks
from vlm.model.image_spec import ImageSpec
from vlm.model.image_tokens import TokenReader, token_reader
from vlm.model.lock import projection_of
from vlm.model.patch_dropout import PatchDropout, patch_dropout_of, patch_dropouts
from vlm.model.pixels import pixels_for


class TowerOutput(NamedTuple):
    """An embedding, not yet of unit norm, and the states of the tokens that it was pooled from."""

    embedding: Float[Tensor, "batch dim"]
    tokens: Float[Tensor, "batch tokens width"]


class Tower(nn.Module, ABC):
    """The base of both towers: blocks, a projection to the embedding, and a lock on the rest."""

    def __init__(self) -> None:
        super().__init__()
        self._unlocked: list[nn.Module] | None = None  # None: all of the tower trains

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks in order, by which the tower can be locked or sharded; none where none repeat."""

    def stacks(self) -> Sequence[Sequence[nn.Module]]:
        """The blocks by stacks, each of which begins at the inputs; several where networks stand side by side."""
        return [blocks] if (blocks := self.blocks()) else []

    @abstractmethod
    def projection_parts(self) -> list[nn.Module | nn.Parameter]:
        """The last map to the embedding; empty where features are the embedding."""

    def lock(self, all_but: int = 0) -> None:
        """Keep all weights as they are but those of the last `all_but` blocks and of the projection, for good.

        What is locked computes as in evaluation, also in training mode. Raises ValueError for more blocks than there
        are.
        """
        blocks = self.blocks()
        if all_but > len(blocks):
            raise ValueError(f"found {all_but}; the tower has {len(blocks)} blocks")
        unlocked_layers = [*blocks[len(blocks) - all_but :], *self.projection_parts()]
        self._unlocked = [layer for layer in unlocked_layers if isinstance(layer, nn.Module)]
        unlocked = {id(layer) for layer in unlocked_layers} | {
            id(p) for layer in self._unlocked for p in layer.parameters()
        }
        for parameter in self.parameters():
            if id(parameter) not in unlocked:
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Tower":
        """Training or evaluation mode; what is locked stays in evaluation mode."""
        super().train(mode and self._unlocked is None)
        for module in self._unlocked or ():
            module.train(mode)
        return self


class ImageTower(Tower):
    """uint8 images to embeddings: normalisation on the device, then the trunk (open_clip, timm or transformers)."""

    def __init__(self, trunk: nn.Module, spec: ImageSpec) -> None:
        super().__init__()
        self.trunk = trunk
        self.spec = spec
        self.pixels = pixels_for(trunk, spec.mean, spec.std)
        self._with_tokens: TokenReader | None = None
        self._dropouts: list[PatchDropout] = []
        # One convolution makes patches; a network of several is faster, mostly, with its channels last in memory.
        self._convolves = sum(isinstance(module, nn.Conv2d) for module in trunk.modules()) > 1

    def forward(
        self, images: UInt8[Tensor, "batch 3 height width"], patch_dropout: float | None = None
    ) -> Float[Tensor, "batch dim"] | TowerOutput:
        """Embeddings, not yet of unit norm; with the tokens that they were pooled from, once `emit_tokens` asked.

        `patch_dropout` is the share of patches that are left out in training; other than None and 0 it needs
        `allow_patch_dropout` before.
        """
        if patch_dropout is not None:
            for dropout in self._dropouts:
                dropout.prob = patch_dropout
        pixels = self.pixels(images)
        if self._convolves:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if self._with_tokens is None:
            return self.trunk(pixels)  # type: ignore[no-any-return]
        return TowerOutput(*self._with_tokens(pixels))

    @property
    def patch_dropout(self) -> float:
        """The share of patches that it leaves out by itself, in training."""
        return 0.0 if self._unlocked is not None else patch_dropout_of(self.trunk)

    def allow_patch_dropout(self) -> None:
        """Let each batch say how many patches are left out, for good. Raises ValueError where none can be."""
        if self._unlocked is not None:
            raise ValueError("a locked tower computes as in evaluation, with all patches")
        self._dropouts = patch_dropouts(self.trunk)

    def emit_tokens(self, feature_map: int | None = None) -> None:
        """Let every forward tell its tokens too, for good; see `token_reader`, and what it raises."""
        self._with_tokens = token_reader(self.trunk, feature_map)

    def blocks(self) -> Sequence[nn.Module]:  # noqa: D102
        return repeated_blocks(self.trunk)

    def stacks(self) -> Sequence[Sequence[nn.Module]]:  # noqa: D102
        return repeated_stacks(self.trunk)

    def projection_parts(self) -> list[nn.Module | nn.Parameter]:  # noqa: D102
        return projection_of(self.trunk)


class TextTower(Tower):
    """Token ids to embeddings.

    `may_shorten` promises that a batch cut to its longest text gives what the full context length gives; the tokenizer
    follows it. Token ids behind a text's length are padding, whatever their value.
    """

    def __init__(self, context_length: int, pad_id: int) -> None:
        super().__init__()
        self.groups_texts = True  # in training, where the tower can
        self.length_step = 1  # tokens: texts are padded to a multiple of it in training
        self.context_length = context_length
        self.pad_id = pad_id

    @property
    @abstractmethod
    def may_shorten(self) -> bool:
        """Whether texts need no padding beyond the longest of a batch."""

    @abstractmethod
    def forward(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch dim"] | TowerOutput:
        """Embeddings, not yet of unit norm; with the states of all tokens, once `emit_tokens` asked for them."""

    @property
    def remembers(self) -> bool:
        """Whether the forward takes a cache, and goes on behind the tokens that it knows: for token states alone."""
        return False

    def emit_tokens(self) -> None:
        """Let every forward tell its token states too, for good.

        Raises ValueError for a tower whose states depend on tokens that come later, or that does not tell them.
        """
        raise ValueError(f"a {type(self).__name__} tells no token states that depend on earlier tokens alone")

    def blocks(self) -> Sequence[nn.Module]:  # noqa: D102
        return most_repeated(self)

    def projection_parts(self) -> list[nn.Module | nn.Parameter]:  # noqa: D102
        return projection_of(self)

    def in_steps(self, tokens: Int64[Tensor, "batch length"]) -> Int64[Tensor, "batch longer"]:
        """The same with padding up to a multiple of `length_step`, or to the context length."""
        length = min(-(-tokens.shape[1] // self.length_step) * self.length_step, self.context_length)
        return functional.pad(tokens, (0, max(0, length - tokens.shape[1])), value=self.pad_id)

    def padded(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"], length: int
    ) -> Int64[Tensor, "batch {length}"]:
        """The same texts with this tower's padding id behind each, `length` long."""
        ids = tokens.new_full((len(tokens), length), self.pad_id)
        ids[:, : tokens.shape[1]] = tokens
        return ids.masked_fill(torch.arange(length, device=tokens.device) >= lengths[:, None], self.pad_id)
