"""The loop of a run: a step, then its hooks, until the last step or a stop."""

from collections.abc import Callable, Sequence

from vlm.activity import activity, phase
from vlm.batch import Batch
from vlm.training.batch_source import BatchSource
from vlm.training.control import RunControl
from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.step import TrainState, train_step

_SLACK = 4.0  # hooks write checkpoints and evaluate: they may take longer than a step before that is a hang


class Trainer:
    """Trains from any step to the last. All that lasts is in the state, the step, and what the hooks keep."""

    def __init__(
        self,
        state: TrainState,
        source: BatchSource,
        hooks: Sequence[Hook],
        control: RunControl,
        *,
        learning_rate: Callable[[int], float],
        plan: MicroBatchPlan,
        seed: int,
    ) -> None:
        self._state = state
        self._source = source
        self._hooks = hooks
        self._control = control
        self._learning_rate = learning_rate
        self._plan = plan
        self._seed = seed

    def run(self, start_step: int) -> None:
        """Train from `start_step` completed steps to the end, unless a signal ends it before. Collective.

        Raises:
            StoppedError: a signal asked for it, and the step that it stopped after is saved.
        """
        engine, control = self._state.engine, self._control
        engine.module.train()
        self._done(start_step)
        for hook in self._hooks:
            hook.before_first_step(start_step)
        self._raise_if_stopping(start_step)
        for batch in control.clock.timed(self._source.batches(start_step, control.num_steps - start_step)):
            activity.touch()
            with phase("transfer"):
                device_batch = batch.to(engine.world.device)
            if batch.step == start_step:
                engine.warm_up(device_batch, self._state.objective.needs.outputs)
            event = self._take_step(device_batch)
            self._done(event.step)
            control.stops.ask(event.step, control.num_steps)
            for hook in self._hooks:
                with phase(type(hook).__name__):
                    hook.after_step(event)
            activity.touch()
            self._raise_if_stopping(event.step)

    def _done(self, step: int) -> None:
        activity.step = step
        activity.touch(_SLACK)

    def _take_step(self, batch: Batch) -> StepEvent:
        lr = self._learning_rate(batch.step)
        result = train_step(self._state, batch, self._plan, self._seed, lr)
        step = batch.step + 1
        return StepEvent(step, step == self._control.num_steps, lr, batch, result)

    def _raise_if_stopping(self, step: int) -> None:
        if self._control.stops.is_stopping:
            raise self._control.stops.stopped(step)
