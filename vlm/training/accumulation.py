"""Accumulation with all negatives: micro-batches through the towers, one evaluation of the objective on all of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.activity import phase
from vlm.batch import Batch
from vlm.objectives.objective import Objective
from vlm.outputs import Outputs, gradients_at, is_shared, joined, loss_with, split
from vlm.training.engines.base import Engine
from vlm.training.micro_batches import MicroBatch, MicroBatchPlan
from vlm.training.randomness import seed_step
from vlm.training.teacher import Teacher


@dataclass(frozen=True)
class LossOutput:
    """This rank's part of the objective and of its terms, and the outputs that pairs were compared at; no graph."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    outputs: Outputs


def accumulate(
    engine: Engine, objective: Objective, batch: Batch, plan: MicroBatchPlan, seed: int, teacher: Teacher | None = None
) -> LossOutput:
    """Add the gradient of the objective over the global batch to the weights' gradients. Collective.

    All micro-batches are embedded; the pair terms are evaluated once, at leaves, on all of the rank's rows; then each
    micro-batch takes its rows' gradient back through the towers, and the local terms' with it. A single micro-batch
    keeps its graph. Several are embedded without one, then again under the same random numbers (GradCache: Gao et al.,
    2021): memory is one micro-batch's graph and O(rows dim). A loss that is no finite number makes the gradient NaN on
    all ranks, whatever the term's own gradient is.
    """
    counts, micro_batches = objective.count(batch), plan.of(objective.prepared(batch))
    forward = _Forward(engine, batch.step, seed)
    teacher_outputs = _teacher_outputs(teacher, objective, micro_batches)
    keeps_graph = len(micro_batches) == 1
    with torch.set_grad_enabled(keeps_graph):
        needed = objective.needs if keeps_graph else objective.pair_needs
        embedded = [forward(micro_batch, needed.outputs) for micro_batch in micro_batches]
    leaves = _leaves(embedded, micro_batches, objective.pair_needs.outputs)
    with phase("similarity"):
        loss, terms = objective.evaluate_pairs(leaves, batch, teacher=_of_all_rows(teacher_outputs, micro_batches))
        gradients = gradients_at(_nan_unless_finite(loss), leaves)
    # Whether a step would lower a scale at its limit is a question to the gradient of the whole global batch.
    gradients["logit_scale"] = engine.world.sum(gradients["logit_scale"]) / engine.world.size
    loss = loss.detach()
    for micro_batch, rows in zip(micro_batches, _by_micro_batch(gradients, embedded, micro_batches), strict=True):
        with engine.accumulating(last=micro_batch is micro_batches[-1]):
            outputs = embedded[0] if keeps_graph else forward(micro_batch, objective.needs.outputs)
            total = loss_with(rows, outputs)
            if micro_batch.has_rows:
                teacher_rows = teacher_outputs[micro_batch.number]
                local, by_term = objective.evaluate_local(outputs, micro_batch.batch, counts, teacher=teacher_rows)
                total = total + _nan_unless_finite(local)
                loss = loss + local.detach()
                terms |= {name: terms.get(name, 0.0) + value for name, value in by_term.items()}
            with phase("backward"):
                engine.backward(total)
    return LossOutput(loss, terms, {name: value.detach() for name, value in leaves.items()})


@torch.no_grad()
def remember(
    engine: Engine, objective: Objective, batch: Batch, plan: MicroBatchPlan, seed: int, teacher: Teacher | None = None
) -> None:
    """Let what the objective remembers see the global batch as a step would, without a gradient. Collective."""
    counts, micro_batches = objective.count(batch), plan.of(objective.prepared(batch))
    forward = _Forward(engine, batch.step, seed)
    teacher_outputs = _teacher_outputs(teacher, objective, micro_batches)
    embedded = [forward(micro_batch, objective.needs.outputs) for micro_batch in micro_batches]
    leaves = _leaves(embedded, micro_batches, objective.pair_needs.outputs)
    objective.evaluate_pairs(leaves, batch, teacher=_of_all_rows(teacher_outputs, micro_batches))
    for micro_batch, outputs, teacher_rows in zip(micro_batches, embedded, teacher_outputs, strict=True):
        if micro_batch.has_rows:
            objective.evaluate_local(outputs, micro_batch.batch, counts, teacher=teacher_rows)
    objective.commit()


@dataclass(frozen=True)
class _Forward:
    """The forward of a micro-batch, which draws the same random numbers every time."""

    engine: Engine
    step: int
    seed: int

    def __call__(self, micro_batch: MicroBatch, outputs: frozenset[str]) -> Outputs:
        seed_step(self.seed, self.step, self.engine.world.rank, micro_batch.number)
        with phase("towers"):
            return self.engine.forward(micro_batch.batch, outputs)


def _teacher_outputs(
    teacher: Teacher | None, objective: Objective, micro_batches: list[MicroBatch]
) -> list[dict[str, Tensor]]:
    if teacher is None:
        return [{} for _ in micro_batches]
    return teacher.forward(micro_batches, objective.needs.teacher_outputs)


def _of_all_rows(outputs: list[Outputs] | list[dict[str, Tensor]], micro_batches: list[MicroBatch]) -> Outputs:
    return joined([outputs[micro_batch.number] for micro_batch in micro_batches if micro_batch.has_rows])


def _leaves(embedded: list[Outputs], micro_batches: list[MicroBatch], names: frozenset[str]) -> dict[str, Tensor]:
    """The outputs of all rows that pair terms read, as leaves of a new graph."""
    return {
        name: output.detach().requires_grad_(torch.is_grad_enabled())
        for name, output in _of_all_rows(embedded, micro_batches).items()
        if name in names or is_shared(name)
    }


def _by_micro_batch(
    gradients: Outputs, embedded: list[Outputs], micro_batches: list[MicroBatch]
) -> list[dict[str, Tensor]]:
    """The gradients of each micro-batch's rows; those of what all rows share belong to the last one."""
    numbers = [micro_batch.number for micro_batch in micro_batches if micro_batch.has_rows]
    by_micro_batch: list[dict[str, Tensor]] = [{} for _ in micro_batches]
    for number, rows in zip(numbers, split(gradients, [embedded[number] for number in numbers]), strict=True):
        by_micro_batch[number] = rows
    by_micro_batch[-1] |= {name: gradient for name, gradient in gradients.items() if is_shared(name)}
    return by_micro_batch


def _nan_unless_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss itself where it is finite, else one whose gradient is NaN: the gradient's sum over ranks tells them all.

    So the ranks agree on a bad loss without a message or a wait of its own.
    """
    finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
    return loss * finite
