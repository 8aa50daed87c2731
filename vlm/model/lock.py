"""Locks on towers, whose weights stand still while the rest trains (LiT, locked-image tuning: Zhai et al., 2022)."""

from typing import Literal

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from pydantic import Field
from torch import nn

from vlm.config import Config

_PROJECTIONS = ("projection", "proj", "text_projection", "head")


class AllBut(Config):
    """A tower locked but for its last blocks."""

    all_but: int = Field(gt=0, le=4096, description="so many blocks, the last ones, train beside the projection")


class LockConfig(Config):
    """Which towers are locked, whole or but for their last blocks.

    The projection to the embedding (and a head behind it) trains all the same. All else, also what a tower has behind
    its blocks, keeps its weights and its moving statistics, has no dropout, and takes no memory of an optimizer.
    """

    image: Literal["all"] | AllBut | None = Field(default=None, description="the image tower; null: all of it trains")
    text: Literal["all"] | AllBut | None = Field(default=None, description="the text tower; null: all of it trains")


def projection_of(network: nn.Module) -> list[nn.Module | nn.Parameter]:
    """The parts of a tower that project to the embedding; none where features are the embedding.

    Looked for are the names under which open_clip, transformers models as towers and networks of one's own have it.
    """
    if isinstance(network, ModifiedResNet):
        return [network.attnpool.c_proj]
    if isinstance(network, TimmModel) and not any(True for _ in network.head.parameters()):
        return [network.trunk.get_classifier()]
    layers = (getattr(network, name, None) for name in _PROJECTIONS)
    return [layer for layer in layers if isinstance(layer, nn.Module | nn.Parameter)][:1]
