"""Accumulation with all negatives: micro-batches through the towers, one evaluation of the objective on all of them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.batch import AllCaptions, Batch
from vlm.encoded import Encoded
from vlm.objectives.objective import Objective
from vlm.training.engine import Engine, first_captions, touched
from vlm.training.randomness import seed_step
from vlm.training.teacher import Teacher, micro_batches


@dataclass(frozen=True)
class Evaluated:
    """This rank's shares of the objective and of its terms, and what they were evaluated at; no graph."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    image: Float[Tensor, "rows dim"]
    text: Float[Tensor, "rows dim"]
    logit_scale: Float[Tensor, "1"]


@dataclass(frozen=True)
class MicroBatches:
    """How a rank's rows of a global batch are cut: every rank runs the same number of forwards."""

    global_batch: int
    world_size: int
    rows: int | None = None  # of one rank that go through the towers together; None: all of them

    @property
    def count(self) -> int:
        """Forwards a step and rank."""
        fullest = math.ceil(self.global_batch / self.world_size)
        return 1 if self.rows is None else math.ceil(fullest / self.rows)

    def cut(self, num_rows: int) -> list[tuple[int, int]]:
        """Where each micro-batch of `num_rows` starts and stops; where rows are fewer than cuts, some are empty."""
        return [(num_rows * part // self.count, num_rows * (part + 1) // self.count) for part in range(self.count)]


def accumulate(
    engine: Engine, objective: Objective, batch: Batch, cuts: MicroBatches, seed: int, teacher: Teacher | None = None
) -> Evaluated:
    """Add the gradient of the objective over the global batch to the weights' gradients. Collective.

    With one micro-batch: forward, objective, backward. With several, two passes (GradCache: Gao et al., 2021): all are
    embedded without a graph, the objective is evaluated once on all of the rank's embeddings and differentiated there,
    then each is embedded again under the same random numbers and takes its embeddings' gradient back through the
    towers. Terms that compare no pairs join the second pass. Memory: one micro-batch's graph and O(rows dim).
    A loss that is no finite number makes the gradient NaN on all ranks, whatever the term's own gradient is.
    """
    parts = cuts.cut(len(batch.images))
    captions = objective.needs_captions and batch.captions is not None
    taught = teacher.embed(batch, parts, captions=captions) if teacher else None
    if len(parts) == 1:
        seed_step(seed, batch.step, engine.world.rank)
        encoded = engine.encode(batch, captions=captions)
        total, shares = objective.evaluate(encoded, batch, teacher=taught)
        engine.backward(_or_nan(total) + 0.0 * touched(encoded))  # DDP waits for parameters that no term reads
        return _evaluated(total.detach(), shares, encoded)
    passes = _TwoPasses(engine, objective, batch, parts, seed)
    leaves = passes.embed()
    seed_step(seed, batch.step, engine.world.rank)
    encoded = leaves.encoded(batch.captions if captions else None)
    total, shares = objective.evaluate(encoded, batch, teacher=taught, pairwise=True)
    more, other_shares = passes.backward(leaves.gradients(_or_nan(total)), cuts.global_batch)
    return _evaluated(total.detach() + more, {**shares, **other_shares}, encoded)


@torch.no_grad()
def remember(
    engine: Engine, objective: Objective, batch: Batch, cuts: MicroBatches, seed: int, teacher: Teacher | None = None
) -> None:
    """Let what the objective remembers see the global batch as a step would, without a gradient. Collective."""
    parts = cuts.cut(len(batch.images))
    captions = objective.needs_captions and batch.captions is not None
    taught = teacher.embed(batch, parts, captions=captions) if teacher else None
    leaves = _TwoPasses(engine, objective, batch, parts, seed).embed()
    objective.evaluate(leaves.encoded(batch.captions if captions else None), batch, teacher=taught)
    objective.commit()


def _evaluated(loss: Tensor, terms: dict[str, Tensor], encoded: Encoded) -> Evaluated:
    return Evaluated(loss, terms, encoded.image.detach(), encoded.text.detach(), encoded.logit_scale.detach())


@dataclass(frozen=True)
class _Leaves:
    """What the objective is differentiated at, or its gradients there; `texts` is all that the text tower made."""

    image: Float[Tensor, "rows dim"]
    texts: Float[Tensor, "texts dim"]
    logit_scale: Float[Tensor, "1"]
    logit_bias: Float[Tensor, "1"] | None
    parameters: dict[str, Tensor]

    def encoded(self, captions: AllCaptions | None) -> Encoded:
        """As the terms read it; with several captions of an image, its text is the first."""
        parts = (self.logit_scale, self.logit_bias)
        if captions is None:
            return Encoded(self.image, self.texts, *parts, parameters=self.parameters)
        text = self.texts[first_captions(captions.rows, len(self.image))]
        return Encoded(self.image, text, *parts, captions=self.texts, parameters=self.parameters)

    def gradients(self, total: Tensor) -> "_Leaves":
        """d total / d leaf, in the leaf's place."""
        bias = [] if self.logit_bias is None else [self.logit_bias]
        tensors = [self.image, self.texts, self.logit_scale, *bias, *self.parameters.values()]
        found = [torch.zeros_like(tensor) for tensor in tensors]
        if total.requires_grad:
            grads = torch.autograd.grad(total, tensors, allow_unused=True)
            found = [zeros if grad is None else grad for zeros, grad in zip(found, grads, strict=True)]
        image, texts, scale, *rest = found
        own = dict(zip(self.parameters, rest[len(bias) :], strict=True))
        return _Leaves(image, texts, scale, rest[0] if bias else None, own)


class _TwoPasses:
    """The micro-batches of one step on one rank, embedded twice with the same random numbers."""

    def __init__(
        self, engine: Engine, objective: Objective, batch: Batch, parts: list[tuple[int, int]], seed: int
    ) -> None:
        self._engine, self._objective = engine, objective
        self._batch, self._parts, self._seed = batch, parts, seed
        self._captions = objective.needs_captions and batch.captions is not None

    @torch.no_grad()
    def embed(self) -> "_Leaves":
        """All embeddings, the scale, the bias and the terms' parameters, as leaves of a new graph."""
        encodings = [(encoded, filled) for _, encoded, filled in self._forwards()]
        kept = [encoded for encoded, filled in encodings if filled]
        first = kept[0]
        return _Leaves(
            _leaf(torch.cat([encoded.image for encoded in kept])),
            _leaf(torch.cat([_texts(encoded) for encoded in kept])),
            _leaf(first.logit_scale),
            None if first.logit_bias is None else _leaf(first.logit_bias),
            {name: _leaf(value) for name, value in first.parameters.items()},
        )

    def backward(self, gradients: "_Leaves", num_pairs: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Embed again and go back through the towers; the shares of the terms that compare no pairs."""
        total, shares = gradients.image.new_zeros(()), dict[str, Tensor]()
        for number, (part, encoded, filled) in enumerate(self._forwards(accumulating=True)):
            loss = 0.0 * touched(encoded)
            if filled:
                loss = loss + self._of_rows(encoded, gradients, number)
            if number == len(self._parts) - 1:
                loss = loss + _of_parameters(encoded, gradients)
            more, of_terms = self._objective.evaluate(encoded, part, pairwise=False, num_pairs=num_pairs)
            self._engine.backward(loss + _or_nan(more) * filled)
            total = total + more.detach() * filled
            for name, share in of_terms.items():
                shares[name] = shares.get(name, 0.0) + share * filled
        return total, shares

    def _forwards(self, *, accumulating: bool = False) -> Iterator[tuple[Batch, Encoded, bool]]:
        for number, (part, filled) in enumerate(micro_batches(self._batch, self._parts)):
            seed_step(self._seed, self._batch.step, self._engine.world.rank, number)
            last = not accumulating or number == len(self._parts) - 1
            with self._engine.accumulating(last=last):
                yield part, self._engine.encode(part, captions=self._captions), filled

    def _of_rows(self, encoded: Encoded, gradients: "_Leaves", number: int) -> Tensor:
        start, stop = self._parts[number]
        image = (encoded.image * gradients.image[start:stop]).sum()
        if self._captions:
            assert self._batch.captions is not None
            owners = self._batch.captions.rows
            start, stop = torch.searchsorted(owners, torch.tensor([start, stop], device=owners.device)).tolist()
        return image + (_texts(encoded) * gradients.texts[start:stop]).sum()


def _or_nan(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss itself where it is finite, else one whose gradient is NaN: the gradient's sum over ranks tells them all.

    So the ranks agree on a bad loss without a message or a wait of its own.
    """
    finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
    return loss * finite


def _texts(encoded: Encoded) -> Tensor:
    """What the text tower made: of each row one text, or all captions."""
    return encoded.text if encoded.captions is None else encoded.captions


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _of_parameters(encoded: Encoded, gradients: _Leaves) -> Tensor:
    """The objective's own dependence on scale, bias and parameters: added once, with the last micro-batch."""
    loss = (encoded.logit_scale * gradients.logit_scale).sum()
    if encoded.logit_bias is not None and gradients.logit_bias is not None:
        loss = loss + (encoded.logit_bias * gradients.logit_bias).sum()
    for name, parameter in encoded.parameters.items():
        loss = loss + (parameter * gradients.parameters[name]).sum()
    return loss
