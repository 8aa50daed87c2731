"""The parts that a trainer is handed: the source of its batches, and evaluators of its model with their schedule."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vlm.batch import Batch
from vlm.evaluation import Evaluator


@runtime_checkable
class BatchSource(Protocol):
    """Where batches come from: position in, batches out."""

    num_samples: int
    max_bad_share: float

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """This rank's rows of global batches `start_step` to `start_step + num_steps`."""

    def state(self, step: int) -> dict[str, Any]:
        """The state of the data that a checkpoint after `step` steps must hold, besides that number. Collective."""

    def forget(self, step: int) -> None:
        """Drop what only a return to before `step` could need."""


@dataclass(frozen=True)
class ScheduledEvaluation:
    """An evaluator, and after how many steps it runs again. It always runs at the end."""

    name: str
    evaluator: Evaluator
    every_steps: int | None
