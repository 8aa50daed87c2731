"""The contract of the training data, as a trainer reads it."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from vlm.batch import Batch


@runtime_checkable
class BatchSource(Protocol):
    """Where batches come from: position in, batches out."""

    num_samples: int
    max_bad_share: float

    def batches(self, start_step: int, num_steps: int) -> Iterator[Batch]:
        """This rank's rows of global batches `start_step` to `start_step + num_steps`."""

    def state(self, step: int) -> dict[str, Any]:
        """The state of the data that a checkpoint after `step` steps must hold, besides that number. Collective."""

    def discard_before(self, step: int) -> None:
        """Drop what only a return to before `step` could need."""
