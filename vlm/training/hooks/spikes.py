"""What is done about a spike: the step is left out, or the run goes on from a checkpoint of before."""

from collections.abc import Iterable
from pathlib import Path

from vlm.checkpoint.folder import step_of
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import LeftOut, SpikeRecord, Stretch
from vlm.ends.failures import FAILURES, Failures
from vlm.errors import EveryRankError, UserError
from vlm.training.hooks.base import StepEvent
from vlm.training.recorder import Recorder
from vlm.training.spikes import Spike, SpikeWatch
from vlm.training.state import restore_memory, restore_state
from vlm.training.step import TrainState

ROLLED_BACK = "rolled_back_to"


class SpikeGuard:
    """The guard's part for spikes: what it does depends on the steps and on the regular checkpoints alone.

    The way back is a checkpoint, not a copy in memory: it costs nothing, and it is there after a kill. It is one of the
    regular ones (a stop saves others, which a run that was left alone does not have), of the way that the run goes.
    After a roll-back to r at step s the run goes on with step s + 1: steps r + 1 to s are left out, and every step
    keeps its global batch.
    """

    def __init__(
        self, watch: SpikeWatch, state: TrainState, recorder: Recorder, every_steps: int, before: SpikeRecord
    ) -> None:
        self._watch = watch
        self._state = state
        self._recorder = recorder
        self._every_steps = every_steps
        self._failures = Failures(recorder.run.path, recorder.run.world.rank)
        self._spikes = before.spikes
        self._left_out = before.left_out

    def after_spike(self, event: StepEvent, spike: Spike, left_out: LeftOut) -> LeftOut:
        """Leave the step out, and undo those before it where that is asked for; what is left out by now. Collective.

        Raises:
            EveryRankError: it is one spike too many.
        """
        config, step = self._watch.config, event.step
        loss = float(event.result.loss_output.loss)
        message = f"step {step} was left out: {spike.words}; this rank's part of the loss is {loss}"
        self._failures.add("spike", message, step=step, keys=list(event.batch.keys))
        self._spikes = (*(one for one in self._spikes if one > step - config.within), step)
        if len(self._spikes) > config.most:
            raise EveryRankError(
                f"guard: {len(self._spikes)} spikes within {config.within} steps, the last in step {step} "
                f"({spike.words}); {FAILURES} names their samples; to go on: --resume auto --allow-changes with a "
                "lower optimizer.lr, or a larger guard.z or guard.most"
            )
        way_back = self._way_back(step) if config.action == "roll_back" else None
        if way_back is None:
            more = "; no checkpoint is of before" if config.action == "roll_back" else ""
            self._recorder.say(f"step {step}  left out: {spike.words}{more} ({FAILURES} names its samples)")
            self._left_out = (*self._left_out, Stretch(first=step, last=step))
            return LeftOut(total=left_out.total + 1)
        return self._roll_back(step, way_back, spike)

    def _way_back(self, step: int) -> Checkpoint | None:
        """The newest regular checkpoint to go on from after a spike; one being written is waited for. Collective."""
        saved = {step_of(path): path for path in self._recorder.run.complete_checkpoints()}
        ways = sorted(self._ways(saved, step - self._watch.config.steps_back), reverse=True)
        return next(filter(None, (self._undamaged(saved[way]) for way in ways)), None)

    def _undamaged(self, path: Path) -> Checkpoint | None:
        """The checkpoint if no rank finds anything wrong with it. Collective."""
        world, checkpoint, problem = self._state.engine.world, None, ""
        try:
            checkpoint = Checkpoint(path)
        except UserError as error:
            problem = str(error)
        problem = next(filter(None, world.gather_objects(problem)), "")
        if checkpoint is not None and not problem:
            try:
                checkpoint.verify(world)
            except EveryRankError as error:
                problem = str(error)
            else:
                return checkpoint
        self._recorder.say(f"{path} is passed over: {problem}")
        return None

    def _ways(self, saved: Iterable[int | None], most: int) -> list[int]:
        """The regular ones among the steps that are saved, at most that far, on the way that the run goes."""
        regular = [one for one in saved if one is not None and one <= most and one % self._every_steps == 0]
        return [one for one in regular if not any(left.first <= one < left.last for left in self._left_out)]

    def _roll_back(self, step: int, checkpoint: Checkpoint, spike: Spike) -> LeftOut:
        restore_state(checkpoint, self._state.engine, self._state.ema, self._state.teacher)
        restore_memory(checkpoint, self._state.objective)
        manifest = checkpoint.manifest
        target = manifest.step
        self._watch.restore(manifest.spikes)
        kept = tuple(one for one in self._left_out if one.last <= target)
        self._left_out = (*kept, Stretch(first=target + 1, last=step))
        self._recorder.say(
            f"step {step}  rolled back to step {target}: {spike.words}; the {step - target} steps since then are left "
            f"out ({FAILURES} names the samples of the last)"
        )
        self._recorder.write(step, {ROLLED_BACK: target})
        return LeftOut(total=manifest.left_out.total + step - target)

    def record(self) -> SpikeRecord:
        """What the next life goes on from: the windows, the last spikes, and all steps that are not in the weights."""
        return self._watch.record().model_copy(update={"spikes": self._spikes, "left_out": self._left_out})

    def needed(self, step: int) -> list[int]:
        """The checkpoints that a roll-back from a later step than `step` may need, as this rank sees them."""
        if self._watch.config.action != "roll_back":
            return []
        ways = self._ways(self._recorder.run.checkpoint_steps(), step)
        newest = max((way for way in ways if way <= step + 1 - self._watch.config.steps_back), default=0)
        return [way for way in ways if way >= newest]
