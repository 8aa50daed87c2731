"""The evaluations of a run: every so many steps, and after the last."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlm.ends.stops import EvaluationStoppedError
from vlm.errors import reason
from vlm.evaluation import Artifact, Evaluation, Evaluator, Metric
from vlm.training.control import RunControl
from vlm.training.hooks.base import Hook, StepEvent
from vlm.training.recorder import Recorder
from vlm.training.run_files import EXAMPLES
from vlm.training.skips import skips_of_all_ranks
from vlm.training.step import TrainState

_MOST_SHOWN = 12


@dataclass(frozen=True)
class ScheduledEvaluation:
    """An evaluator, and after how many steps it runs again. It always runs at the end."""

    name: str
    evaluator: Evaluator
    every_steps: int | None

    def is_due(self, event: StepEvent) -> bool:
        """Whether it runs after this step."""
        return event.is_last or (self.every_steps is not None and event.step % self.every_steps == 0)


class Evaluations(Hook):
    """Runs what is due, on the averaged weights where there are any. A stop leaves the rest to the next life.

    `pending` are the names of those that the run's last life has left.
    """

    def __init__(
        self,
        scheduled: Sequence[ScheduledEvaluation],
        state: TrainState,
        recorder: Recorder,
        control: RunControl,
        pending: Sequence[str] = (),
    ) -> None:
        self._scheduled = scheduled
        self._state = state
        self._recorder = recorder
        self._control = control
        self._pending = [evaluation for evaluation in scheduled if evaluation.name in pending]
        self._has_told = False

    def before_first_step(self, step: int) -> None:  # noqa: D102
        self._run_pending(step)

    def after_step(self, event: StepEvent) -> None:  # noqa: D102
        self._pending = [evaluation for evaluation in self._scheduled if evaluation.is_due(event)]
        with self._control.clock.paused():
            if self._pending:
                self._recorder.run.settle()  # it may take long: what ends the run meanwhile must not cost a checkpoint
            self._tell_notices()
            self._run_pending(event.step)

    def manifest_fields(self, step: int) -> dict[str, Any]:  # noqa: ARG002, D102
        return {"pending": tuple(evaluation.name for evaluation in self._pending)}

    def _tell_notices(self) -> None:
        """Say what a reader of the figures should know of the data: after the first step, for all texts are read."""
        if self._has_told or not self._recorder.run.world.is_main:
            return
        self._has_told = True
        for evaluation in self._scheduled:
            for line in evaluation.evaluator.notices:
                self._recorder.say(line)

    def _run_pending(self, step: int) -> None:
        while self._pending and not self._control.stops.is_stopping:
            try:
                self._run(self._pending[0], step)
            except EvaluationStoppedError:
                return
            self._pending = self._pending[1:]

    def _run(self, evaluation: ScheduledEvaluation, step: int) -> None:
        """Run one evaluation, and write its figures and what it skipped. Collective."""
        engine, ema = self._state.engine, self._state.ema
        world = replace(engine.world, pulse=self._control.stops.check)
        with engine.swapped_weights(ema.shards if ema else {}):
            result = evaluation.evaluator.run(engine.module, world)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in _for_a_line(result, evaluation.evaluator.metrics))
        self._recorder.say(f"step {step}  {evaluation.name}: {shown}")
        tables = {name: asdict(table) for name, table in result.tables.items()}
        written = {f"eval/{evaluation.name}/{name}": value for name, value in {**result.figures, **tables}.items()}
        self._recorder.write(step, written)
        skips = skips_of_all_ranks(evaluation.evaluator.skipped, f"evaluate:{evaluation.name}", world)
        self._recorder.run.log_skips([(step, skip) for skip in skips] if world.is_main else [])
        if step == self._control.num_steps and result.examples is not None and world.is_main:
            self._write_examples(result.examples, evaluation.name)

    def _write_examples(self, examples: Artifact, evaluation: str) -> None:
        """Write pictures for the report. The last step is not saved yet: what fails here must not lose it."""
        try:
            examples.write(self._recorder.run.path / EXAMPLES / evaluation)
        except Exception as error:
            problem = f"{type(error).__name__}: {reason(error)}"
            self._recorder.say(f"{evaluation}: its examples could not be written: {problem}")


def _for_a_line(result: Evaluation, metrics: Sequence[Metric]) -> list[tuple[str, float]]:
    """The figures that are shown as the run goes on: where there are many, no details."""
    details = {metric.name for metric in metrics if metric.prominence == "detail"}
    hidden = details if len(result.figures) > _MOST_SHOWN else set()
    return [(name, value) for name, value in result.figures.items() if name not in hidden]
