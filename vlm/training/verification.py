"""Whether a launch computes the gradient that one process computes on the whole batch, without sharding, in fp32."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.batch import Batch
from vlm.checkpoint.format import TERM_PARAMETERS
from vlm.model.dual_encoder import DualEncoder
from vlm.objectives.objective import Objective
from vlm.outputs import Outputs, joined
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.precision import Precision
from vlm.training.randomness import seed_step

# open_clip's, timm's and transformers' names of a tower's last projection.
_HEAD = re.compile(r"\.(proj|text_projection|visual_projection|proj\.weight|proj\.bias|head\..*)$")
# Cosine at least, and norm ratio at most so far from 1: rounding in another order, or bf16 products.
TOLERANCES: dict[Precision, tuple[float, float]] = {"fp32": (0.9999, 0.005), "bf16": (0.97, 0.1)}


@dataclass(frozen=True)
class GroupComparison:
    """How the gradient of one group of parameters lies beside the reference."""

    group: str
    num_values: int
    cosine: float
    norm_ratio: float

    def is_right(self, precision: Precision) -> bool:
        """Whether direction and length agree as far as the precision lets them."""
        least, most = TOLERANCES[precision]
        return self.cosine >= least and abs(self.norm_ratio - 1) <= most


def parameter_group(name: str) -> str:
    """The group of a parameter in the comparison: scale, bias, a tower, its head, or what a term learns."""
    if name.startswith(TERM_PARAMETERS):
        return "terms"
    if name in ("logit_scale", "logit_bias"):
        return name.replace("_", " ")
    tower = name.partition(".")[0]
    if tower in ("decoder", "image_pooler", "embedding_tokens"):
        return tower.replace("_", " ")
    return f"{tower} head" if _HEAD.search(name) else f"{tower} tower"


def compare_gradients(
    names: Iterable[str], gradient_of: Callable[[str], Tensor], expected: Mapping[str, Tensor] | None
) -> list[GroupComparison]:
    """Cosine and norm ratio by group, compared only where `expected` is given. Collective, as `gradient_of` is.

    A group that neither side gives a gradient is right by definition.
    """
    sums: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        gradient = gradient_of(name)
        if expected is None:
            continue
        a, b = gradient.double().flatten().cpu(), expected[name].double().flatten().cpu()
        group = parameter_group(name)
        totals = sums.setdefault(group, [0.0, 0.0, 0.0])
        for place, value in enumerate((a @ b, a @ a, b @ b)):
            totals[place] += float(value)
        sizes[group] = sizes.get(group, 0) + a.numel()
    return [_comparison(group, sizes[group], *totals) for group, totals in sums.items()]


def _comparison(group: str, size: int, product: float, square: float, expected_square: float) -> GroupComparison:
    if square == expected_square == 0:
        return GroupComparison(group, size, 1.0, 1.0)
    cosine = product / (square * expected_square) ** 0.5 if square and expected_square else 0.0
    return GroupComparison(group, size, cosine, (square / expected_square) ** 0.5 if expected_square else float("inf"))


def reference_gradients(
    model: DualEncoder,
    objective: Objective,
    steps: Sequence[list[Batch]],
    rows: int | None,
    seed: int,
) -> dict[str, Tensor]:
    """The gradient of the objective over all ranks' rows of the last step, from one graph in this process, in fp32.

    Each of `steps` are the ranks' batches in rank order; the objective only remembers those before the last. `rows` is
    the micro-batch, so that dropout draws what each rank drew for each of its micro-batches. `objective` is one
    process's: of the ranks' it has terms and memory, not their exchange.
    """
    *earlier, last = steps
    for batches in earlier:
        with torch.no_grad():
            _value(model, objective, batches, rows, seed)
        objective.commit()
    _value(model, objective, last, rows, seed).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _value(model: DualEncoder, objective: Objective, batches: list[Batch], rows: int | None, seed: int) -> Tensor:
    """The objective over all ranks' samples, each micro-batch embedded as its rank embeds it."""
    batches = [objective.prepared(batch.to(objective.exchange.world.device)) for batch in batches]
    plan = MicroBatchPlan(sum(map(len, batches)), len(batches), rows)
    teacher = _teacher_outputs(model, objective, batches) if objective.needs.teacher_outputs else None
    embedded = []
    for rank, batch in enumerate(batches):
        for micro_batch in plan.of(batch):
            seed_step(seed, batch.step, rank, micro_batch.number)
            if micro_batch.has_rows:
                embedded.append(model(micro_batch.batch.parts, objective.needs.outputs))
    value, _ = objective.evaluate(joined(embedded), Batch.cat(batches), teacher=teacher)
    return value


@torch.no_grad()
def _teacher_outputs(model: DualEncoder, objective: Objective, batches: list[Batch]) -> Outputs:
    """At the start the teacher has the model's weights."""
    model.eval()
    outputs = joined([model(batch.parts, objective.needs.teacher_outputs) for batch in batches])
    model.train()
    return outputs
