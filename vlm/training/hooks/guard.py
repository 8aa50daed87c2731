"""The guard against steps without a finite loss or gradient, and against spikes: counted, recorded, few in a row."""

from typing import Any

from vlm.checkpoint.manifest import LeftOut
from vlm.ends.failures import FAILURES, Failures
from vlm.errors import EveryRankError
from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.hooks.spikes import SpikeGuard
from vlm.training.recorder import Recorder

LEFT_OUT = "steps_left_out"


class Guard(Hook):
    """The count of steps left out; each is in `failures.jsonl` with the keys of its samples, rank by rank."""

    def __init__(
        self, recorder: Recorder, max_bad_steps: int, before: LeftOut, spikes: SpikeGuard | None = None
    ) -> None:
        self._recorder = recorder
        self._failures = Failures(recorder.run.path, recorder.run.world.rank)
        self._max_bad_steps = max_bad_steps
        self._spikes = spikes
        self.left_out = before

    def after_step(self, event: StepEvent) -> None:
        """Count a step that was left out, and write that it was. Collective where it was a spike.

        Raises:
            EveryRankError: it is the last of `max_bad_steps` in a row, or one spike too many.
        """
        if not event.result.left_out:
            self.left_out = LeftOut(total=self.left_out.total)
        elif event.result.spike is not None and self._spikes is not None:
            self.left_out = self._spikes.after_spike(event, event.result.spike, self.left_out)
            self._recorder.write(event.step, {LEFT_OUT: self.left_out.total})
        else:
            self._count_bad(event)

    def _count_bad(self, event: StepEvent) -> None:
        self.left_out = LeftOut(total=self.left_out.total + 1, in_a_row=self.left_out.in_a_row + 1)
        step, loss = event.step, float(event.result.loss_output.loss)
        self._failures.add(
            "step-left-out",
            f"step {step} was left out: this rank's part of the loss is {loss}, the gradient's norm "
            f"{event.result.grad_norm}",
            step=step,
            keys=list(event.batch.keys),
        )
        if self.left_out.in_a_row >= self._max_bad_steps:
            raise EveryRankError(
                f"max_bad_steps: {self.left_out.in_a_row} steps in a row up to step {step} had a loss or a gradient "
                f"that is no finite number, and were left out; {FAILURES} names their samples, vlm replay "
                f"{self._recorder.run.path} --step {step} where it begins; to go on: --resume auto "
                "--allow-changes with a lower optimizer.lr, precision=fp32, or a larger max_bad_steps"
            )
        self._recorder.say(
            f"step {step}  left out: its loss or gradient is no finite number ({FAILURES} names its samples)"
        )
        self._recorder.write(step, {LEFT_OUT: self.left_out.total})

    def manifest_fields(self, step: int) -> dict[str, Any]:  # noqa: ARG002, D102
        return {"left_out": self.left_out, **({} if self._spikes is None else {"spikes": self._spikes.record()})}

    def needed_checkpoints(self, step: int) -> list[int]:  # noqa: D102
        return [] if self._spikes is None else self._spikes.needed(step)
