"""The checkpoints of a run: every so many steps, after the last, and before a stop; written while training goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm.checkpoint.deletion import Deletion
from vlm.checkpoint.folder import put_away
from vlm.checkpoint.manifest import Manifest
from vlm.checkpoint.retention import Retention
from vlm.checkpoint.writer import Group, Writer
from vlm.training.batch_source import BatchSource
from vlm.training.control import RunControl
from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.recorder import Recorder
from vlm.training.state import local_memory, memory_groups, state_groups
from vlm.training.step import TrainState


@dataclass(frozen=True)
class CheckpointPlan:
    """When checkpoints are written, which are kept (None: all), and what stays the same in them.

    `background`: whether training goes on while one is written.
    """

    every_steps: int
    keep: Retention | None
    manifest: Manifest
    background: bool = True
    on_saved: Callable[[int], None] = lambda _: None  # called on rank 0 with the step of each that is complete


class Checkpoints(Hook):
    """Saves the state of a run, and what the hooks before it go on from.

    One that is being written is completed at the first step that finds it whole on all ranks, or earlier when it is
    waited for: by the next one, by the end of the run, by who is about to read checkpoints (`RunDirectory.settle`).
    """

    def __init__(
        self,
        state: TrainState,
        source: BatchSource,
        hooks: Sequence[Hook],
        recorder: Recorder,
        control: RunControl,
        plan: CheckpointPlan,
    ) -> None:
        self._state = state
        self._source = source
        self._hooks = hooks
        self._recorder = recorder
        self._control = control
        self._plan = plan
        self._writer = Writer(recorder.run.checkpoints, state.engine.world, background=plan.background)
        self._deletion = Deletion(state.engine.world)
        self._saved = 0  # the step of the last that is complete
        self._good_steps: list[int] = []
        self._room_is_told = False
        recorder.run.settle = self._finish

    def before_first_step(self, step: int) -> None:  # noqa: D102
        self._tell_of_room(step, self._writer.lack_of_room(*self._tensors()))

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        ends = event.is_last or self._control.stops.is_stopping
        if ends or event.step % self._plan.every_steps == 0:
            with self._control.clock.paused():
                self._settle()
                self._begin(event.step)
                if not self._plan.background:
                    self._settle()
                if ends:
                    self._room_is_told = True  # no other one comes
                    self._finish()
        elif self._writer.step is not None and self._writer.is_written():
            self._settle()
        self._look_for_room()

    def _begin(self, step: int) -> None:
        """Copy the state after `step` steps, and begin to write it. Collective."""
        engine = self._state.engine
        changing: dict[str, Any] = {
            "step": step,
            "samples": self._recorder.num_samples(step),
            "num_updates": engine.num_updates(),
            "threads": torch.get_num_threads(),
            "stream": self._source.state(step),
        }
        for hook in self._hooks:
            changing |= hook.manifest_fields(step)
        manifest = self._plan.manifest.model_copy(update=changing)
        self._deletion.wait()
        self._look_for_room()
        self._writer.begin(manifest, *self._tensors())
        # As they are at this step: what is kept depends on no clock.
        self._good_steps = self._recorder.alarms.good_steps()

    def _tensors(self) -> tuple[dict[str, Group], dict[str, dict[str, torch.Tensor]]]:
        """What is written, as groups of all ranks and of this one."""
        state = self._state
        groups = state_groups(state.engine, state.ema, state.teacher) | memory_groups(state.objective)
        return groups, local_memory(state.objective)

    def _look_for_room(self) -> None:
        """Look whether there is room for the next one when what is old was deleted. Collective."""
        if self._deletion.has_ended() and not self._room_is_told:
            self._tell_of_room(self._saved, self._writer.lack_of_room())

    def _tell_of_room(self, step: int, lack: str | None) -> None:
        """Say once that the next checkpoint will fail for want of room."""
        if lack is not None:
            self._room_is_told = True
            self._recorder.say(
                f"step {step}  {self._recorder.run.checkpoints} has no room for the next checkpoint ({lack}): make "
                "some before it is due, or the run ends there"
            )

    def _finish(self) -> None:
        """Leave nothing under way. Collective."""
        self._settle()
        self._deletion.wait()

    def _settle(self) -> None:
        """Complete the checkpoint that is being written, if one is, and take away those that it makes old. Collective.

        Raises:
            EveryRankError: it could not be written.
        """
        step = self._writer.step
        if step is None:
            return
        self._writer.complete()
        self._saved = step
        run, old = self._recorder.run, list[Path]()
        if run.world.is_main:
            run.history.add("saved", step)
            needed = [one for hook in self._hooks for one in hook.needed_checkpoints(step)]
            good = [*self._good_steps, *needed]
            old = put_away(run.checkpoints, self._plan.keep, step, good, self._recorder.watched)
            self._source.discard_before(min(run.checkpoint_steps()))
            self._plan.on_saved(step)
        run.world.barrier()  # what is put away is no checkpoint any more
        self._deletion.begin(old)
