"""The guard against steps whose loss or gradient is no finite number: they are counted, recorded, and few in a row."""

from vlm.batch import Batch
from vlm.checkpoint.manifest import LeftOut
from vlm.ends.failures import FAILURES, Failures
from vlm.errors import EveryRankError
from vlm.training.run_directory import RunDirectory
from vlm.training.step import StepResult


class Guard:
    """The count of steps left out; each is in `failures.jsonl` with the keys of its samples, rank by rank."""

    def __init__(self, run: RunDirectory, max_bad_steps: int, before: LeftOut) -> None:
        self._failures = Failures(run.path, run.world.rank)
        self._max_bad_steps = max_bad_steps
        self.left_out = before

    def note(self, step: int, batch: Batch, result: StepResult) -> None:
        """Count a step, `step` steps being done with it.

        Raises:
            EveryRankError: it is the last of `max_bad_steps` in a row that were left out.
        """
        total, in_a_row = self.left_out.total, self.left_out.in_a_row
        if not result.left_out:
            self.left_out = LeftOut(total=total)
            return
        self.left_out = LeftOut(total=total + 1, in_a_row=in_a_row + 1)
        loss = float(result.loss_output.loss)
        self._failures.add(
            "step-left-out",
            f"step {step} was left out: this rank's part of the loss is {loss}, the gradient's norm {result.grad_norm}",
            step=step,
            keys=list(batch.keys),
        )
        if self.left_out.in_a_row >= self._max_bad_steps:
            raise EveryRankError(
                f"max_bad_steps: {self.left_out.in_a_row} steps in a row up to step {step} had a loss or a gradient "
                f"that is no finite number, and were left out; {FAILURES} names their samples; to go on: --resume auto "
                "--allow-changes with a lower optimizer.lr, precision=fp32, or a larger max_bad_steps"
            )
