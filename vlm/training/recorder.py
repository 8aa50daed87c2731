"""The one way of a run's figures to metrics.jsonl, trackers and alarms, and of its lines to people."""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from vlm.errors import EveryRankError
from vlm.training.alarm import Alarm, Alarms
from vlm.training.progress import ProgressDisplay
from vlm.training.run_directory import RunDirectory
from vlm.training.trackers import Trackers


class Recorder:
    """Writes what rank 0 knows, and lets alarms judge it, which go on after the lines that the run has written.

    `watched` are figures whose values by step are kept: those of evaluations, by which checkpoints are kept.
    """

    def __init__(
        self,
        run: RunDirectory,
        trackers: Trackers,
        alarms: Alarms,
        progress: ProgressDisplay,
        global_batch: int,
        watched: Collection[str] = (),
    ) -> None:
        self.run = run
        self.alarms = alarms
        self._trackers = trackers
        self._progress = progress
        self._global_batch = global_batch
        self.watched: dict[str, dict[int, float]] = {name: {} for name in watched}  # by the step; on rank 0
        lines = run.metrics() if alarms or watched else []
        if alarms:
            alarms.replay(lines)
        for line in lines:
            self._watch(line["step"], line)

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
        self._watch(step, figures)

    def _watch(self, step: int, figures: Mapping[str, Any]) -> None:
        for name, values in self.watched.items():
            if name in figures:
                values[step] = figures[name]

    def _stop(self, step: int, alarm: Alarm) -> NoReturn:
        self.run.settle()
        before = [saved for saved in self.run.checkpoint_steps() if saved <= alarm.since]
        newest = f"the newest checkpoint of before is that of step {before[-1]}" if before else "none is of before"
        raise EveryRankError(f"step {step}: {alarm.message}; {newest} ({self.run.checkpoints})")
