"""Whether a launch computes the gradient that one process computes on the whole batch, without sharding, in fp32."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm.batch import AllCaptions, Batch
from vlm.encoded import Encoded
from vlm.model.dual_encoder import DualEncoder
from vlm.model.logit_scale import whole_gradients
from vlm.objectives.objective import Objective
from vlm.training.accumulation import MicroBatches
from vlm.training.checkpoint import TERM_PARAMETERS
from vlm.training.engine import Precision, encoding
from vlm.training.randomness import seed_step
from vlm.training.teacher import micro_batches

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
    return f"{tower} head" if _HEAD.search(name) else f"{tower} tower"


def compare_gradients(
    names: Iterable[str], found: Callable[[str], Tensor], expected: Mapping[str, Tensor] | None
) -> list[GroupComparison]:
    """Cosine and norm ratio by group. Collective: `found` is; only where `expected` is given is anything compared.

    A group that neither side gives a gradient is right by definition.
    """
    sums: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        gradient = found(name)
        if expected is None:
            continue
        a, b = gradient.double().flatten().cpu(), expected[name].double().flatten().cpu()
        group = parameter_group(name)
        totals = sums.setdefault(group, [0.0, 0.0, 0.0])
        for place, value in enumerate((a @ b, a @ a, b @ b)):
            totals[place] += float(value)
        sizes[group] = sizes.get(group, 0) + a.numel()
    return [_comparison(group, sizes[group], *totals) for group, totals in sums.items()]


def _comparison(group: str, size: int, product: float, found: float, expected: float) -> GroupComparison:
    if found == expected == 0:
        return GroupComparison(group, size, 1.0, 1.0)
    cosine = product / (found * expected) ** 0.5 if found and expected else 0.0
    return GroupComparison(group, size, cosine, (found / expected) ** 0.5 if expected else float("inf"))


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
    with whole_gradients():
        _value(model, objective, last, rows, seed).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _value(model: DualEncoder, objective: Objective, batches: list[Batch], rows: int | None, seed: int) -> Tensor:
    device = objective.exchange.world.device
    cuts = MicroBatches(sum(len(batch.images) for batch in batches), len(batches), rows)
    several = objective.needs_captions and all(batch.captions is not None for batch in batches)
    teacher = _taught(model, objective, batches, several) if objective.needs_teacher else None
    encodings = []
    for rank, batch in enumerate(batches):
        for number, (part, filled) in enumerate(micro_batches(batch.to(device), cuts.cut(len(batch.images)))):
            seed_step(seed, batch.step, rank, number)
            if filled:
                encodings.append(encoding(model, part, captions=several))
    value, _ = objective.evaluate(_joined(encodings), joined_batches(batches).to(device), teacher=teacher)
    return value


@torch.no_grad()
def _taught(model: DualEncoder, objective: Objective, batches: list[Batch], several: bool) -> Encoded:
    """At the start the teacher has the model's weights."""
    model.eval()
    device = objective.exchange.world.device
    taught = _joined([encoding(model, batch.to(device), captions=several) for batch in batches])
    model.train()
    return taught


def _joined(encodings: list[Encoded]) -> Encoded:
    captions = [encoded.captions for encoded in encodings if encoded.captions is not None]
    return replace(
        encodings[-1],
        image=torch.cat([encoded.image for encoded in encodings]),
        text=torch.cat([encoded.text for encoded in encodings]),
        captions=torch.cat(captions) if captions else None,
    )


def joined_batches(batches: list[Batch]) -> Batch:
    """The ranks' rows as one batch, texts padded to the longest."""
    first = batches[0]
    labels = [batch.labels for batch in batches if batch.labels is not None]
    several = [batch.captions for batch in batches if batch.captions is not None]
    return replace(
        first,
        images=torch.cat([batch.images for batch in batches]),
        tokens=_padded([batch.tokens for batch in batches]),
        lengths=torch.cat([batch.lengths for batch in batches]),
        sample_ids=torch.cat([batch.sample_ids for batch in batches]),
        keys=tuple(key for batch in batches for key in batch.keys),
        labels=torch.cat(labels) if labels else None,
        captions=_joined_captions(several, batches) if several else None,
    )


def _joined_captions(several: list[AllCaptions], batches: list[Batch]) -> AllCaptions:
    starts = [sum(len(batch.images) for batch in batches[:rank]) for rank in range(len(batches))]
    return AllCaptions(
        _padded([captions.tokens for captions in several]),
        torch.cat([captions.lengths for captions in several]),
        torch.cat([captions.rows + start for captions, start in zip(several, starts, strict=True)]),
    )


def _padded(tokens: list[Tensor]) -> Tensor:
    longest = max(part.shape[1] for part in tokens)
    return torch.cat([pad(part, (0, longest - part.shape[1])) for part in tokens])
