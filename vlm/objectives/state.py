"""The memory of terms and providers from step to step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vlm.distributed.world import World


@dataclass(frozen=True)
class RunFacts:
    """Facts that a state may depend on: the embedding's width, the data's size, the run's length, and the ranks."""

    dim: int
    num_samples: int
    num_steps: int
    steps_per_epoch: int
    seed: int
    world: World


class TermState(ABC):
    """The memory of a term or provider from step to step; it is in the checkpoint, whatever the world size.

    A step proposes a change while the term is evaluated; `commit` makes it last, once a step, after the update.
    `discard` drops it where the step is left out.
    """

    @abstractmethod
    def commit(self) -> None:
        """Make the last evaluation's proposal last. Collective."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the last evaluation's proposal."""

    @abstractmethod
    def proposal_check(self) -> Float[Tensor, ""] | None:
        """0, or NaN where the last evaluation's proposal holds what is no number: added to the loss, it stops both."""

    def replicated(self) -> dict[str, Tensor]:
        """Tensors that are the same on all ranks."""
        return {}

    def local(self) -> dict[str, Tensor]:
        """Tensors of which each rank holds other rows (the first dimension may differ from rank to rank)."""
        return {}

    @abstractmethod
    def restore(self, replicated: dict[str, Tensor], local: list[dict[str, Tensor]]) -> None:
        """Go back to a saved state: the replicated tensors, and what each rank of that time held, in rank order."""
