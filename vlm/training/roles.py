"""What a trainer is handed: where its batches come from, and what measures its model."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vlm.batch import Batch, Skip
from vlm.world import World


@runtime_checkable
class BatchSource(Protocol):
    """Where batches come from: position in, batches out."""

    num_samples: int
    max_bad_share: float

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """This rank's rows of global batches `start_step` to `start_step + num_steps`."""

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps must hold of the data, besides that number. Collective."""

    def forget(self, step: int) -> None:
        """Drop what only a return to before `step` could need."""


@runtime_checkable
class RunnableEvaluator(Protocol):
    """Measures a model; all ranks share the work and get the same figures."""

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines on the set that a reader of the figures should know."""

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """The samples that were of no use so far, as far as this rank knows."""

    @property
    def figures(self) -> Collection[str]:
        """The names of the figures that `run` may bring."""

    def run(self, model: Any, world: World) -> dict[str, float]:
        """The figures by name."""


@dataclass(frozen=True)
class ScheduledEvaluation:
    """An evaluator, and after how many steps it runs again. It always runs at the end."""

    name: str
    evaluator: RunnableEvaluator
    every_steps: int | None
