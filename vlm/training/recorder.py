"""The one way of a run's figures to metrics.jsonl, trackers and alarms, and of its lines to people."""

from collections.abc import Mapping
from typing import Any, NoReturn

from vlm.errors import EveryRankError
from vlm.training.alarm import Alarm, Alarms
from vlm.training.progress import ProgressDisplay
from vlm.training.run_directory import RunDirectory
from vlm.training.trackers import Trackers


class Recorder:
    """Writes what rank 0 knows, and lets alarms judge it. The alarms go on after the lines that the run has written."""

    def __init__(
        self, run: RunDirectory, trackers: Trackers, alarms: Alarms, progress: ProgressDisplay, global_batch: int
    ) -> None:
        self.run = run
        self.alarms = alarms
        self._trackers = trackers
        self._progress = progress
        self._global_batch = global_batch
        if alarms:
            alarms.replay(run.metrics())

    def num_samples(self, step: int) -> int:
        """The samples of so many steps."""
        return step * self._global_batch

    def say(self, line: str) -> None:
        """Show a line that stays."""
        self._progress.say(line)

    def show(self, step: int, words: str) -> None:
        """Show how far the run is, and figures of the moment."""
        self._progress.update(step, words)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Write the figures of rank 0, and do what the alarms say about them. Collective where there are alarms.

        Raises:
            EveryRankError: an alarm stops the run.
        """
        self._append(step, figures)
        self._trackers.log(step, figures)
        if not self.alarms:
            return
        raised, *_ = self.run.world.gather_objects(self.alarms.observe(step, figures))
        for alarm in raised:
            self.say(f"step {step}  {alarm.message}")
            self._append(step, {"alarm": alarm.message})
            if alarm.stops:
                self._stop(step, alarm)

    def _append(self, step: int, figures: Mapping[str, Any]) -> None:
        self.run.log_metrics({"step": step, "samples": self.num_samples(step), **figures})

    def _stop(self, step: int, alarm: Alarm) -> NoReturn:
        self.run.settle()
        before = [saved for saved in self.run.checkpoint_steps() if saved <= alarm.since]
        newest = f"the newest checkpoint of before is that of step {before[-1]}" if before else "none is of before"
        raise EveryRankError(f"step {step}: {alarm.message}; {newest} ({self.run.checkpoints})")
