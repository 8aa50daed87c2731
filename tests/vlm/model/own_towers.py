"""Towers of one's own, as somebody outside the project writes them."""

import torch
from torch import Tensor, nn

from vlm.model.tokenizer import Tokenizer
from vlm.model.tower_config import ImageTowerConfig, TextTowerConfig, TowerContext
from vlm.model.towers import TextTower


class Patches(nn.Module):
    """Mean colours of patches through residual layers, with dropout and batch norm, then a projection."""

    def __init__(self, width: int, depth: int, embed_dim: int) -> None:
        super().__init__()
        self.stem = nn.Linear(48, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(0.5))
            for _ in range(depth)
        )
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = self.stem(nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1))
        for layer in self.layers:
            rows = rows + layer(rows)
        projected: Tensor = self.projection(rows)
        return projected


class OwnImage(ImageTowerConfig):
    """An image tower of one's own."""

    width: int = 8
    depth: int = 2

    def images(self, files: object) -> dict[str, object]:
        return {"size": 16, "mean": (0.5, 0.5, 0.5)}

    def build(self, context: TowerContext) -> nn.Module:
        return Patches(self.width, self.depth, context.embed_dim)


class Bag(TextTower):
    """The mean of the embeddings of a text's tokens."""

    def __init__(self, size: int, context_length: int, pad_id: int, embed_dim: int) -> None:
        super().__init__(context_length, pad_id)
        self.tokens = nn.Embedding(size, embed_dim)

    @property
    def may_shorten(self) -> bool:
        return True

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        seen = torch.arange(tokens.shape[1]) < lengths[:, None]
        mean: Tensor = (self.tokens(tokens) * seen[..., None]).sum(1) / lengths[:, None]
        return mean


class OwnText(TextTowerConfig):
    """A text tower of one's own, with CLIP's tokenizer."""

    context_length: int = 12

    def tokenizer_fields(self) -> dict[str, object]:
        return {"context_length": self.context_length}

    def build(self, context: TowerContext, tokenizer: Tokenizer) -> TextTower:
        return Bag(49408, tokenizer.context_length, tokenizer.pad_id, context.embed_dim)
