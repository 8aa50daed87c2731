"""Memory of a run on a CPU: what tensors of ever other sizes leave unused in the C library's heap is given back."""

import ctypes
from collections.abc import Callable

from vlm.training.hooks.base import Hook, StepEvent

EVERY = 100  # steps


class HeapTrim(Hook):
    """Gives unused pages of the heap back to the system every hundred steps, where the C library can (glibc).

    Captions and documents make tensors of other sizes in each step. Freed ones leave holes between those that stay, and
    a process that needs 1 GB grows by some 10 MB a step.
    """

    def __init__(self) -> None:
        self._trim = malloc_trim()

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        if self._trim is not None and event.step % EVERY == 0:
            self._trim()


def malloc_trim() -> Callable[[], int] | None:
    """The C library's function that gives unused pages back; None where it has none."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    trim.argtypes = [ctypes.c_size_t]
    return lambda: int(trim(0))
