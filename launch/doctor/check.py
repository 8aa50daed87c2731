"""The contract of a check: what it looks at, on which ranks, and what it may rely on."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from accelerate import Accelerator

from launch.findings import Finding
from launch.recipe import Recipe
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.registry import Registry


@dataclass(frozen=True)
class Place:
    """Where a check runs: this rank, its device, and the recipe that a run is to have there, where one was named."""

    world: World
    recipe: Recipe | None = None
    accelerator: Accelerator | None = None

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.world.device

    @property
    def needed(self) -> Recipe:
        """The recipe. Raises EveryRankError where none was named."""
        if self.recipe is None:
            raise EveryRankError("this check needs a RECIPE")
        return self.recipe


class Check(ABC):
    """One kind of thing that is looked at. All ranks run it, in the same order; what they find is put together.

    A check that sends something does so on every rank, whatever it found before.
    """

    needs_recipe: ClassVar[bool] = False

    @abstractmethod
    def findings(self, place: Place) -> Iterable[Finding]:
        """What is found. A UserError is a finding too: a failure. Collective where the check is."""


CHECKS: Registry[type[Check]] = Registry("check", Check)
