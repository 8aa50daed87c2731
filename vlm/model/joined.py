"""Towers of several models side by side, whose unit vectors together are one embedding."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlm.model.blocks import repeated_blocks
from vlm.model.towers import TextTower, TowerOutput


class Member(nn.Module):
    """One of the networks, with the head that it was trained with."""

    def __init__(self, network: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def forward(self, *inputs: Tensor) -> Float[Tensor, "batch dim"]:
        """Unit vectors, in at least fp32."""
        made = self.network(*inputs)
        rows: Tensor = self.head(made.embedding if isinstance(made, TowerOutput) else made)
        with torch.autocast(rows.device.type, enabled=False):
            units: Tensor = normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
        return units


def side_by_side(units: Sequence[Float[Tensor, "batch _"]]) -> Float[Tensor, "batch all"]:
    """Unit vectors one after another, divided by the root of their number: cosines are the means of theirs."""
    together: Tensor = torch.cat(list(units), dim=-1) / len(units) ** 0.5
    return together


class JoinedTrunk(nn.Module):
    """Image networks side by side."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch all"]:
        """The embeddings of normalised pixels."""
        return side_by_side([member(pixels) for member in self.members])

    def networks(self) -> list[nn.Module]:
        """The networks without their heads."""
        return _networks(self.members)

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks of all networks, one network after another."""
        return [block for stack in self.stacks() for block in stack]

    def stacks(self) -> Sequence[Sequence[nn.Module]]:
        """The blocks of each network that has any."""
        return [blocks for network in _networks(self.members) if (blocks := repeated_blocks(network))]


class JoinedTextTower(TextTower):
    """Text towers side by side, of one tokenizer."""

    def __init__(self, members: Sequence[Member], towers: Sequence[TextTower]) -> None:
        super().__init__(towers[0].context_length, towers[0].pad_id)
        self.members = nn.ModuleList(members)
        self._may_shorten = all(tower.may_shorten for tower in towers)

    @property
    def may_shorten(self) -> bool:  # noqa: D102
        return self._may_shorten

    def forward(self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"]) -> Tensor:
        """The embeddings of token ids."""
        return side_by_side([member(tokens, lengths) for member in self.members])

    def blocks(self) -> Sequence[nn.Module]:  # noqa: D102
        return [block for stack in self.stacks() for block in stack]

    def stacks(self) -> Sequence[Sequence[nn.Module]]:  # noqa: D102
        networks = (network for network in _networks(self.members) if isinstance(network, TextTower))
        return [blocks for network in networks if (blocks := network.blocks())]

    def projection_parts(self) -> list[nn.Module | nn.Parameter]:  # noqa: D102
        return []  # a lock leaves nothing free: each member has its own


def _networks(members: nn.ModuleList) -> list[nn.Module]:
    return [member.network for member in members if isinstance(member, Member)]
