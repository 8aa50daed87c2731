"""The contract of hooks, and the step that they are told of."""

from dataclasses import dataclass
from typing import Any

from vlm.batch import Batch
from vlm.training.step import StepResult


@dataclass(frozen=True)
class StepEvent:
    """A step that was just taken.

    Attributes:
        step: the number of steps done, this one among them.
        is_last: whether the run ends with it.
        lr: the learning rate that it took.
        batch: this rank's rows of the global batch, on the device.
        result: this rank's part of the loss, and the gradient's norm.
    """

    step: int
    is_last: bool
    lr: float
    batch: Batch
    result: StepResult


class Hook:
    """An observer of a run. All ranks call all methods, hook by hook in one order, so that each may be collective."""

    def before_first_step(self, step: int) -> None:
        """Called once, when `step` steps are done and the next is about to be taken."""

    def after_step(self, event: StepEvent) -> None:
        """Called after every step, those that were left out among them."""

    def manifest_fields(self, step: int) -> dict[str, Any]:  # noqa: ARG002
        """The fields of the manifest that this hook goes on from, for a checkpoint after `step` steps. Collective."""
        return {}

    def needed_checkpoints(self, step: int) -> list[int]:  # noqa: ARG002
        """The steps whose checkpoints this hook may come back to after `step`: they are not deleted. On rank 0."""
        return []
