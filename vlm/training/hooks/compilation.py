"""What compiling the towers' blocks costs a run at its start."""

import time

from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.recorder import Recorder


class CompilationTime(Hook):
    """Tells how long the first step took, in which blocks are compiled, beside the second; first of all hooks."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._began = 0.0
        self._seconds: list[float] = []

    def before_first_step(self, step: int) -> None:  # noqa: ARG002, D102
        self._began = time.perf_counter()

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        if len(self._seconds) == 2:
            return
        now = time.perf_counter()
        self._seconds.append(now - self._began)
        self._began = now
        if len(self._seconds) == 2:
            first, second = self._seconds
            self._recorder.say(
                f"step {event.step}  compile: the first step took {first:.1f} s, the next {second:.1f} s"
            )
