"""Projection heads between a tower's output and the embedding that is compared."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlm.config import Config

Reading = Literal["after_head", "before_head"]


class HeadConfig(Config):
    """A head behind one tower. `heads` of them give their unit vectors side by side, divided by sqrt(heads).

    So the cosine of two embeddings is the mean of the heads' cosines (AMCL: Wang et al., 2024), and everything that
    compares embeddings works on several heads as on one.

    linear: one matrix. mlp: a hidden layer with layer norm and GELU. (Layer norm, for batch norm would make the
    gradient depend on how the batch is split.) reweight: coordinate i times kappa^-i, nothing to learn (Xue et al.,
    2024): the loss sees some coordinates less, and `before_head` reads them all the same.
    """

    only_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
        "hidden": ("kind", ("mlp",)),
        "kappa": ("kind", ("reweight",)),
    }

    kind: Annotated[Literal["linear", "mlp", "reweight"], Field(description="what the head is made of")]
    dim: Annotated[int | None, Field(gt=0, le=65536, description="width of one head; null: that of the tower")] = None
    hidden: Annotated[int, Field(gt=0, le=2**20, description="width of the hidden layer of an mlp")] = 4096
    kappa: Annotated[float, Field(ge=1, le=10, description="of reweight: 1 leaves everything as it is")] = 1.01
    heads: Annotated[int, Field(gt=0, le=1024, description="how many, each with weights of its own")] = 1

    def embed_dim(self, tower_dim: int) -> int:
        """The width of what the heads make together. Raises ValueError where they can have no such width."""
        if self.kind == "reweight" and (self.heads > 1 or self.dim not in (None, tower_dim)):
            raise ValueError(f"reweight keeps the tower's {tower_dim} dimensions: leave out dim and heads")
        return self.heads * (self.dim or tower_dim)


class Reweight(nn.Module):
    """The fixed diagonal map x_i -> x_i kappa^-i, i from 0."""

    factors: Tensor

    def __init__(self, dim: int, kappa: float) -> None:
        super().__init__()
        factors = torch.full((dim,), kappa, dtype=torch.float64) ** -torch.arange(dim, dtype=torch.float64)
        self.register_buffer("factors", factors.float(), persistent=False)

    def forward(self, rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The same rows, later coordinates smaller."""
        smaller: Tensor = rows * self.factors
        return smaller


class SeveralHeads(nn.Module):
    """Heads side by side, each brought to length 1 and all together too."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch all"]:
        """The unit vectors of all heads, divided by the root of their number."""
        made = [head(rows) for head in self.heads]
        with torch.autocast(rows.device.type, enabled=False):
            units = [normalize(one.to(torch.promote_types(one.dtype, torch.float32)), dim=-1) for one in made]
            together: Tensor = torch.cat(units, dim=-1) / len(units) ** 0.5
            return together


def build_head(config: HeadConfig, tower_dim: int) -> nn.Module:
    """The head that `config` describes, for a tower of this width."""
    heads = [_one_head(config, tower_dim) for _ in range(config.heads)]
    return heads[0] if len(heads) == 1 else SeveralHeads(heads)


def _one_head(config: HeadConfig, tower_dim: int) -> nn.Module:
    if config.kind == "reweight":
        return Reweight(tower_dim, config.kappa)
    dim = config.dim or tower_dim
    if config.kind == "linear":
        return nn.Linear(tower_dim, dim, bias=False)
    return nn.Sequential(
        nn.Linear(tower_dim, config.hidden), nn.LayerNorm(config.hidden), nn.GELU(), nn.Linear(config.hidden, dim)
    )
