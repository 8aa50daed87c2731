"""The record of the samples that each step trained on, rank by rank."""

from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.run_directory import RunDirectory


class SampleRecord(Hook):
    """Appends the keys of every step's samples to this rank's file in the run directory."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        self._run.record_samples(event.step, event.batch)
