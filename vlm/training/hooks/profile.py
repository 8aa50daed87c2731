"""The profile of some steps: a trace of each rank, and a table of phases for the run and its report."""

from dataclasses import asdict

from vlm.distributed.world import World
from vlm.training.clock import Clock
from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.profile import ALONGSIDE, ProfileConfig, StepProfile, span_of, table_of
from vlm.training.recorder import Recorder

FOLDER = "profile"
PHASES = "profile/phases"
"""The table's key in metrics.jsonl."""


class Profile(Hook):
    """Begins after the step before the first, last of all hooks, and ends after the last one or with the run."""

    def __init__(self, recorder: Recorder, world: World, clock: Clock, config: ProfileConfig) -> None:
        self._recorder = recorder
        self._clock = clock
        self._world = world
        self._first, self._last = span_of(config.steps)
        self._began = 0
        self._taken: StepProfile | None = None

    def before_first_step(self, step: int) -> None:  # noqa: D102
        self._begin_after(step)

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        if self._taken is None:
            self._begin_after(event.step)
        elif event.step >= self._last or event.is_last:
            with self._clock.paused():
                self._finish(event.step, self._taken)

    def _begin_after(self, step: int) -> None:
        if self._first <= step + 1 <= self._last:
            self._began, self._taken = step + 1, StepProfile(self._world.device)

    def _finish(self, step: int, taken: StepProfile) -> None:
        """Write what was measured. Collective."""
        self._taken = None
        folder = self._recorder.run.path / FOLDER
        folder.mkdir(exist_ok=True)
        seconds = taken.finish(folder / f"steps-{self._began}-{step}-rank-{self._world.rank}")
        table = table_of(self._world.gather_objects(seconds), self._began, step)
        shares = sorted(((row[1], name) for name, row in table.rows.items() if name != ALONGSIDE), reverse=True)
        words = ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.005)
        self._recorder.say(f"step {step}  profile of steps {self._began} to {step}: {words}; traces are in {folder}")
        self._recorder.write(step, {PHASES: asdict(table)})
