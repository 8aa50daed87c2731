"""One training step."""

from dataclasses import dataclass

from torch import Tensor

from vlm.batch import Batch
from vlm.objectives.objective import evaluate_objective
from vlm.objectives.term import Term
from vlm.training.ema import Ema
from vlm.training.engine import Engine
from vlm.training.randomness import seed_step


@dataclass(frozen=True)
class StepResult:
    """What a step leaves to be logged: this rank's shares of the loss and its terms, the scale, the gradient norm."""

    loss: Tensor
    terms: dict[str, Tensor]
    logit_scale: Tensor
    grad_norm: float


def train_step(
    engine: Engine, terms: dict[str, Term], batch: Batch, ema: Ema | None, seed: int, lr: float
) -> StepResult:
    """Encode, compare, differentiate, update. Collective."""
    seed_step(seed, batch.step, engine.world.rank)
    encoded = engine.encode(batch)
    loss, shares = evaluate_objective(terms, encoded, batch, engine.world)
    engine.backward(loss)
    grad_norm = engine.step(lr)
    if ema is not None:
        ema.update(batch.step)
    return StepResult(loss.detach(), shares, encoded.logit_scale.detach(), grad_norm)
