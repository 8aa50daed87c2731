"""The run: steps, logs, evaluations and checkpoints in their order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch

from vlm.batch import Batch
from vlm.checkpoint.folder import prune
from vlm.checkpoint.format import write_checkpoint
from vlm.checkpoint.manifest import Manifest
from vlm.duration import Duration
from vlm.ends.failures import FAILURES
from vlm.ends.stops import EvaluationStoppedError, Stops
from vlm.errors import EveryRankError, reason
from vlm.evaluation import Artifact
from vlm.geometry.telemetry import FIGURES, PairSample, observe, sample_pairs
from vlm.objectives.objective import Objective
from vlm.similarity.exchange import Exchange
from vlm.training.accumulation import LossOutput
from vlm.training.alarm import Alarm, Alarms, require_known
from vlm.training.clock import Clock
from vlm.training.config import TrainingConfig
from vlm.training.ema import Ema
from vlm.training.engines.base import Engine
from vlm.training.guard import Guard
from vlm.training.ledger import Ledger, skips_of_all_ranks
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.progress import ProgressDisplay
from vlm.training.roles import BatchSource, ScheduledEvaluation
from vlm.training.run_directory import RunDirectory
from vlm.training.run_files import EXAMPLES
from vlm.training.schedule import rate_factor
from vlm.training.state import memory_groups, own_pieces, state_groups
from vlm.training.step import StepResult, TrainState, train_step
from vlm.training.teacher import Teacher
from vlm.training.trackers import Trackers

LEFT_OUT = "steps_left_out"
_OF_A_STEP = ("loss", "logit_scale", "lr", "grad_norm", "samples_per_second", "data_wait", LEFT_OUT)


class Trainer:
    """Runs a training from any step to its end. All that lasts is in the engine, the average and the step."""

    def __init__(
        self,
        config: TrainingConfig,
        engine: Engine,
        objective: Objective,
        source: BatchSource,
        evaluations: list[ScheduledEvaluation],
        run: RunDirectory,
        manifest: Manifest,
    ) -> None:
        self.config = config
        self.engine = engine
        self.objective = objective
        self.source = source
        self.evaluations = evaluations
        self.run_directory = run
        self.manifest = manifest
        self.trackers = Trackers()  # those of the run, once they are started
        self.ema = Ema(config.ema, engine) if config.ema else None
        self.teacher = Teacher(config.teacher, engine) if objective.needs.teacher_outputs else None
        self.num_steps = self._steps(config.duration)
        self._log_every = max(1, self._steps(config.log_every))
        every = config.geometry.every
        self._observe_every = None if every is None else max(1, self._steps(every))
        require_known(config.alarm, self._figures())
        self._alarms = Alarms(config.alarm, self._steps)
        self._checkpoint_every = max(1, self._steps(config.checkpoint_every))
        self._counts: Mapping[str, int] = {}
        self._guard = Guard(run, config.max_bad_steps, manifest.left_out)
        self._warmup_steps = self._steps(config.schedule.warmup)

    def _figures(self) -> dict[str, list[str]]:
        """The names of all figures that an alarm can watch, by the kind of the line that brings them."""
        figures = {"": [*_OF_A_STEP, *self.objective.terms]}
        for evaluation in self.evaluations:
            kind = f"eval/{evaluation.name}"
            figures[kind] = [f"{kind}/{metric.name}" for metric in evaluation.evaluator.metrics]
        if self.config.geometry.every is not None:
            figures["geometry"] = [f"geometry/{name}" for name in FIGURES]
        return figures

    def restore_counts(self, manifest: Manifest) -> None:
        """Go on counting where a checkpoint stopped: rows between two lines of the log, steps left out."""
        self._counts = manifest.counts
        self._guard.left_out = manifest.left_out

    def run(
        self, start_step: int, progress: ProgressDisplay, stops: Stops | None = None, pending: Sequence[str] = ()
    ) -> None:
        """Train from `start_step` completed steps to the end, unless `stops` ends it before. Collective.

        The evaluations named in `pending` are still to be run after `start_step`.

        Raises:
            StoppedError: a signal asked for it, and the step that it stopped after is saved.
        """
        clock = Clock(self.config.global_batch)
        self._alarms.replay(self.run_directory.metrics() if self.config.alarm else ())
        ledger = Ledger(
            self.run_directory,
            self.source.max_bad_share,
            self.config.global_batch,
            start_step,
            self._counts if self.engine.world.is_main else None,
        )
        batches = self.source.batches(start_step, self.num_steps - start_step)
        self.engine.module.train()
        if pending:
            due = [evaluation for evaluation in self.evaluations if evaluation.name in pending]
            if self._evaluate_all(start_step, due, progress, stops) and stops is not None:
                raise stops.stopped(start_step)
        state = TrainState(self.engine, self.objective, self.ema, self.teacher)
        plan = MicroBatchPlan(self.config.global_batch, self.engine.world.size, self.config.micro_batch)
        for host_batch in clock.timed(batches):
            batch = host_batch.to(self.engine.world.device)
            if batch.step == start_step:
                self.engine.warm_up(batch)
            factor = rate_factor(self.config.schedule, batch.step, self._warmup_steps, self.num_steps)
            lr = self.config.optimizer.lr * factor
            result = train_step(state, batch, plan, self.config.seed, lr)
            step = batch.step + 1
            ledger.add(batch)
            if self.config.record_samples:
                self.run_directory.record_samples(step, batch)
            self._guard.note(step, batch, result)
            if result.left_out:
                self._tell_left_out(step, progress)
            else:
                self._log_and_observe(step, lr, result, batch, ledger, clock, progress)
            with clock.paused():
                due = [evaluation for evaluation in self.evaluations if self._is_due(evaluation, step)]
                self._finish(step, due, ledger, progress, stops)

    def _log_and_observe(
        self,
        step: int,
        lr: float,
        result: StepResult,
        batch: Batch,
        ledger: Ledger,
        clock: Clock,
        progress: ProgressDisplay,
    ) -> None:
        if step == 1 or step % self._log_every == 0 or step == self.num_steps:
            self._log(step, lr, result, ledger, clock, progress)
        if self._observe_every is not None and step % self._observe_every == 0:
            self._observe(step, result.loss_output, batch, progress)

    def _tell_left_out(self, step: int, progress: ProgressDisplay) -> None:
        """Write that a step was left out, on the screen and to the metrics."""
        progress.say(f"step {step}  left out: its loss or gradient is no finite number ({FAILURES} names its samples)")
        self._write(step, {LEFT_OUT: self._guard.left_out.total}, progress)

    def _is_due(self, evaluation: ScheduledEvaluation, step: int) -> bool:
        every = evaluation.every_steps
        return step == self.num_steps or (every is not None and step % every == 0)

    def _finish(
        self,
        step: int,
        due: Sequence[ScheduledEvaluation],
        ledger: Ledger,
        progress: ProgressDisplay,
        stops: Stops | None,
    ) -> None:
        """Run the evaluations that are due after a step, and save; a stop leaves them to the next life."""
        stopping = stops is not None and stops.is_due(step, self.num_steps)
        pending = due if stopping else self._evaluate_all(step, due, progress, stops)
        stopping = stopping or bool(pending)
        if stopping or step == self.num_steps or step % self._checkpoint_every == 0:
            ledger.flush(step)
            self.save(step, ledger.counts(), [evaluation.name for evaluation in pending])
        if stopping and stops is not None:
            raise stops.stopped(step)

    def _evaluate_all(
        self, step: int, due: Sequence[ScheduledEvaluation], progress: ProgressDisplay, stops: Stops | None
    ) -> Sequence[ScheduledEvaluation]:
        """Run evaluations in their order, until a stop; those that are left."""
        for place, evaluation in enumerate(due):
            try:
                self.evaluate(evaluation, step, progress, None if stops is None else stops.check)
            except EvaluationStoppedError:
                return due[place:]
        return ()

    def evaluate(
        self,
        evaluation: ScheduledEvaluation,
        step: int,
        progress: ProgressDisplay,
        pulse: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Run one evaluation on the averaged weights where there are any, else on the weights. Collective.

        `pulse` is called between its forwards, and may end it. After the last step its examples are written too.
        """
        world = self.engine.world if pulse is None else replace(self.engine.world, pulse=pulse)
        with self.engine.swapped_weights(self.ema.shards if self.ema else {}):
            result = evaluation.evaluator.run(self.engine.module, world)
        figures = result.figures
        named = {f"eval/{evaluation.name}/{key}": value for key, value in figures.items()}
        shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        progress.say(f"step {step}  {evaluation.name}: {shown}")
        self._write(step, named, progress)
        skips = skips_of_all_ranks(evaluation.evaluator.skipped, f"evaluate:{evaluation.name}", world)
        self.run_directory.log_skips([(step, skip) for skip in skips] if world.is_main else [])
        if step == self.num_steps and result.examples is not None and world.is_main:
            self._write_examples(result.examples, evaluation.name, progress)
        return figures

    def _write_examples(self, examples: Artifact, evaluation: str, progress: ProgressDisplay) -> None:
        """Write pictures for the report. The last step is not saved yet: what fails here must not lose it."""
        try:
            examples.write(self.run_directory.path / EXAMPLES / evaluation)
        except Exception as error:
            progress.say(f"{evaluation}: its examples could not be written: {type(error).__name__}: {reason(error)}")

    def save(self, step: int, counts: Mapping[str, int], pending: Sequence[str] = ()) -> None:
        """Write a checkpoint after `step` steps, whose evaluations named in `pending` are not done. Collective."""
        manifest = self.manifest.model_copy(
            update={
                "step": step,
                "samples": step * self.config.global_batch,
                "num_updates": self.engine.num_updates(),
                "threads": torch.get_num_threads(),
                "stream": self.source.state(step),
                "counts": dict(counts),
                "pending": tuple(pending),
                "left_out": self._guard.left_out,
            }
        )
        folder = self.run_directory.checkpoints
        with torch.no_grad():
            groups = state_groups(self.engine, self.ema, self.teacher) | memory_groups(self.objective)
            write_checkpoint(folder, manifest, groups, self.engine.world, own_pieces(self.objective))
        if self.engine.world.is_main:
            self.run_directory.history.add("saved", step)
            prune(folder, self.config.keep_checkpoints, step, self._alarms.good_steps())
            self.source.forget(min(self.run_directory.checkpoint_steps()))

    def _log(
        self, step: int, lr: float, result: StepResult, ledger: Ledger, clock: Clock, progress: ProgressDisplay
    ) -> None:
        world = self.engine.world
        found = result.loss_output
        names = list(found.terms)
        means = world.sum(torch.stack([found.loss, *(found.terms[name] for name in names)]).double()) / world.size
        loss, *values = means.tolist()
        ledger.flush(step)
        rate, wait = clock.lap(step)
        metrics = {
            "loss": loss,
            **dict(zip(names, values, strict=True)),
            "logit_scale": found.outputs["logit_scale"].item(),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "samples_per_second": rate,
            "data_wait": wait,
            LEFT_OUT: self._guard.left_out.total,
            **ledger.shares(),
        }
        skipped = f"  skipped {ledger.num_skipped}" if ledger.num_skipped else ""
        progress.update(step, f"loss {loss:.4f}  {rate:.0f} samples/s{skipped}")
        self._write(step, metrics, progress)

    def _observe(self, step: int, found: LossOutput, batch: Batch, progress: ProgressDisplay) -> None:
        """Write the geometry of some of the step's pairs. Collective."""
        ranks, _ = Exchange(self.engine.world).count(len(batch))
        own = PairSample(found.outputs["image"], found.outputs["text"], batch.labels)
        pairs = sample_pairs(own, ranks, self.config.geometry.sample, step)
        seen = observe(pairs, found.outputs["logit_scale"].item()) if self.engine.world.is_main else {}
        self._write(step, {f"geometry/{key}": value for key, value in seen.items()}, progress)

    def _write(self, step: int, figures: Mapping[str, Any], progress: ProgressDisplay) -> None:
        """Log what rank 0 knows, and do what the alarms say about it. Collective where there are any."""
        self._record(step, figures)
        if not self.config.alarm:
            return
        raised, *_ = self.engine.world.gather_objects(self._alarms.observe(step, figures))
        for alarm in raised:
            progress.say(f"step {step}  {alarm.message}")
            self.run_directory.log_metrics({**self._place(step), "alarm": alarm.message})
            if alarm.stops:
                self._stop(step, alarm)

    def _record(self, step: int, figures: Mapping[str, Any]) -> None:
        """Write figures to the run's metrics and to the trackers (rank 0)."""
        self.run_directory.log_metrics({**self._place(step), **figures})
        self.trackers.log(step, figures)

    def _place(self, step: int) -> dict[str, int]:
        return {"step": step, "samples": step * self.config.global_batch}

    def _stop(self, step: int, alarm: Alarm) -> NoReturn:
        good = [saved for saved in self.run_directory.checkpoint_steps() if saved <= alarm.since]
        kept = f"the newest checkpoint of before is that of step {good[-1]}" if good else "no checkpoint is of before"
        raise EveryRankError(f"step {step}: {alarm.message}; {kept} ({self.run_directory.checkpoints})")

    def _steps(self, duration: Duration) -> int:
        return duration.steps(self.config.global_batch, self.source.num_samples)
