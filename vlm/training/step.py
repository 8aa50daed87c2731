"""One training step."""

import math
from dataclasses import dataclass

from vlm.batch import Batch
from vlm.objectives.objective import Objective
from vlm.training.accumulation import Evaluated, MicroBatches, accumulate
from vlm.training.ema import Ema
from vlm.training.engine import Engine
from vlm.training.teacher import Teacher


@dataclass(frozen=True)
class Learner:
    """What takes a step: the engine with its weights, the objective with its memory, and the averages that follow."""

    engine: Engine
    objective: Objective
    ema: Ema | None = None
    teacher: Teacher | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step leaves to be logged: this rank's shares and embeddings, the scale, and the gradient norm."""

    evaluated: Evaluated
    grad_norm: float

    @property
    def left_out(self) -> bool:
        """Whether the step changed nothing, its loss or its gradient being no finite number; alike on all ranks."""
        return not math.isfinite(self.grad_norm)


def train_step(learner: Learner, batch: Batch, cuts: MicroBatches, seed: int, lr: float) -> StepResult:
    """Encode, compare, differentiate, update; then let memory and averages follow. Collective.

    A step whose loss (on any rank) or gradient is no finite number is left out: weights, moments, memory and averages
    stay bit for bit what they were.
    """
    found = accumulate(learner.engine, learner.objective, batch, cuts, seed, learner.teacher)
    result = StepResult(found, learner.engine.step(lr))
    if result.left_out:
        learner.objective.discard()
        return result
    learner.objective.commit()
    for average in (learner.ema, learner.teacher):
        if average is not None:
            average.update(batch.step)
    return result
