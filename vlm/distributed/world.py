"""The ranks that work together, and the few things they say to each other outside the gradient's path."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlm.activity import collective


def _nothing() -> None:
    """No pulse."""


@dataclass(frozen=True)
class World:
    """This process's place among `size` ranks; `World()` is one process on its own."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    # Called between the forwards of long work, equally often on every rank; may raise, then on all of them.
    pulse: Callable[[], None] = field(default=_nothing, compare=False, repr=False)

    @staticmethod
    def current(device: torch.device | None = None) -> "World":
        """The world of the default process group, or one process when none was started."""
        place = device or torch.device("cpu")
        if not dist.is_initialized():
            return World(device=place)
        return World(dist.get_rank(), dist.get_world_size(), place)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The element-wise sum of `tensor` over all ranks, the same on each of them."""
        total = tensor.detach().clone()
        if self.size > 1:
            with collective("sum"):
                dist.all_reduce(total)
        return total

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank; small values, pickled between our own ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with collective("gather of objects"):
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with collective("barrier"):
                dist.barrier()
