"""The checkpoints of a run: every so many steps, after the last, and before a stop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm.checkpoint.folder import prune
from vlm.checkpoint.format import write_checkpoint
from vlm.checkpoint.manifest import Manifest
from vlm.training.batch_source import BatchSource
from vlm.training.control import RunControl
from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.recorder import Recorder
from vlm.training.state import local_memory, memory_groups, state_groups
from vlm.training.step import TrainState


@dataclass(frozen=True)
class CheckpointPlan:
    """When checkpoints are written, how many of the newest are kept (None: all), and what stays the same in them."""

    every_steps: int
    keep: int | None
    manifest: Manifest


class Checkpoints(Hook):
    """Saves the state of a run, and what the hooks before it go on from."""

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

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        if event.is_last or self._control.stops.is_stopping or event.step % self._plan.every_steps == 0:
            with self._control.clock.paused():
                self.save(event.step)

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps. Collective."""
        engine, objective, run = self._state.engine, self._state.objective, self._recorder.run
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
        with torch.no_grad():
            groups = state_groups(engine, self._state.ema, self._state.teacher) | memory_groups(objective)
            write_checkpoint(run.checkpoints, manifest, groups, engine.world, local_memory(objective))
        if engine.world.is_main:
            run.history.add("saved", step)
            needed = [one for hook in self._hooks for one in hook.needed_checkpoints(step)]
            prune(run.checkpoints, self._plan.keep, step, [*self._recorder.alarms.good_steps(), *needed])
            self._source.discard_before(min(run.checkpoint_steps()))
