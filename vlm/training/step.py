"""One training step."""

import math
from dataclasses import dataclass

from vlm.activity import phase
from vlm.attention_choice import MeasuredAttention
from vlm.batch import Batch
from vlm.objectives.objective import Objective
from vlm.training.accumulation import LossOutput, accumulate
from vlm.training.ema import Ema
from vlm.training.engines.base import Engine
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.spikes import Spike, SpikeWatch
from vlm.training.teacher import Teacher


@dataclass(frozen=True)
class TrainState:
    """The state that a step changes: the engine's weights, the objective's memory, and the averages that follow.

    `spikes` knows usual steps from others, where a guard is asked for. `attention` says how it is computed.
    """

    engine: Engine
    objective: Objective
    ema: Ema | None = None
    teacher: Teacher | None = None
    spikes: SpikeWatch | None = None
    attention: tuple[MeasuredAttention, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """The result of a step, to be logged: this rank's part of the loss and its outputs, and the gradient norm."""

    loss_output: LossOutput
    grad_norm: float
    spike: Spike | None = None

    @property
    def left_out(self) -> bool:
        """Whether the step changed nothing: no finite loss or gradient, or a spike; alike on all ranks."""
        return self.spike is not None or not math.isfinite(self.grad_norm)


def train_step(state: TrainState, batch: Batch, plan: MicroBatchPlan, seed: int, lr: float) -> StepResult:
    """Encode, compare, differentiate, update; then let memory and averages follow. Collective.

    A step whose loss (on any rank) or gradient is no finite number, or a spike, is left out: weights, moments, memory
    and averages stay bit for bit what they were.
    """
    loss_output = accumulate(state.engine, state.objective, batch, plan, seed, state.teacher)
    with phase("optimizer"):
        result = _updated(state, loss_output, lr)
    if result.left_out:
        state.objective.discard()
        return result
    state.objective.commit()
    with phase("averages"):
        for average in (state.ema, state.teacher):
            if average is not None:
                average.update(batch.step)
    return result


def _updated(state: TrainState, loss_output: LossOutput, lr: float) -> StepResult:
    """The result of the update, if it is one. Collective."""
    engine, spikes = state.engine, state.spikes
    if spikes is None:
        return StepResult(loss_output, engine.step(lr))
    loss = float(engine.world.sum(loss_output.loss.double())) / engine.world.size
    engine.most_norm = spikes.most_norm(loss)
    norm = engine.step(lr)
    return StepResult(loss_output, norm, spikes.judge(loss, norm))
