"""Where in a step the first number is that is not finite: which layer's output or gradient, or which term."""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.objectives.terms.clip import Clip
from vlm.training.accumulation import LossOutput, accumulate
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.step import TrainState

_LARGEST_MATRIX = 16_384  # pairs, whose losses are found one by one
_FUNCTION = re.compile(r"Function '(\w+)' returned nan")


@dataclass(frozen=True)
class Finding:
    """What one rank found in a step.

    Attributes:
        forward: the first layer whose output is not finite though its inputs are; None where all are finite.
        terms: the terms whose values are not finite, with these.
        backward: the first layer, from the loss on, at whose output or weights the gradient is not finite.
        last_finite: where it was seen last before, and finite; None: nowhere, it comes from the loss.
        function: the operation whose gradient became NaN first, where it could be found.
        samples: keys of samples with an embedding that is not finite.
        shares: the part that each sample of this rank has in the contrastive loss of all; empty where not known.
        loss: this rank's part of the loss.
    """

    forward: str | None
    terms: Mapping[str, float]
    backward: str | None
    last_finite: str | None
    function: str | None
    samples: tuple[str, ...]
    shares: tuple[float, ...]
    loss: float


class _Watch:
    """The first layer with an output, and the first with a gradient, that is not finite."""

    def __init__(self) -> None:
        self.forward: str | None = None
        self.backward: str | None = None
        self.last_finite: str | None = None

    def see_output(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        tensors = list(_tensors(output))
        if self.forward is None and not _finite(tensors) and _finite(_tensors(inputs)):
            self.forward = name
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(partial(self.see_gradient, f"the output of {name}"))

    def see_gradient(self, name: str, gradient: Tensor) -> None:
        if self.backward is None:
            if _finite([gradient]):
                self.last_finite = name
            else:
                self.backward = name


def find_first(state: TrainState, batch: Batch, plan: MicroBatchPlan, seed: int) -> Finding:
    """What of a step is not finite, and first so; nothing is updated. Collective.

    On one rank alone a gradient that is not finite, of a loss that is, is looked for once more by torch's anomaly
    detection, which names the operation; on several it would end one rank in the midst of what all do.
    """
    with _watching(state.engine.module) as watch:
        output = accumulate(state.engine, state.objective, batch, plan, seed, state.teacher)
    _forget(state)
    terms = {name: float(value) for name, value in output.terms.items() if not math.isfinite(value)}
    function = None
    if watch.backward is not None and not terms and watch.forward is None and state.engine.world.size == 1:
        function = _operation(lambda: accumulate(state.engine, state.objective, batch, plan, seed, state.teacher))
        _forget(state)
    samples = _samples_not_finite(output, batch)
    shares = _shares(state, output, batch)
    loss = float(output.loss)
    return Finding(watch.forward, terms, watch.backward, watch.last_finite, function, samples, shares, loss)


@contextmanager
def _watching(module: nn.Module) -> Iterator[_Watch]:
    watch = _Watch()
    handles = []
    for name, child in module.named_modules():
        if name:
            handles.append(child.register_forward_hook(partial(watch.see_output, name)))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and type(parameter) is nn.Parameter:
            handles.append(parameter.register_hook(partial(watch.see_gradient, f"the weight {name}")))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _forget(state: TrainState) -> None:
    """Drop the gradients and what terms would remember: a step that nothing is small enough for updates nothing."""
    state.engine.most_norm = -1.0
    state.engine.step(0.0)
    state.engine.most_norm = math.inf
    state.objective.discard()


def _operation(work: Callable[[], object]) -> str | None:
    """The operation whose gradient is NaN, and where it was called, by torch's anomaly detection."""
    with warnings.catch_warnings(record=True) as told, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            work()
        except RuntimeError as error:
            found = _FUNCTION.search(str(error))
            if found is None:
                raise
            frames = [line.strip() for one in told for line in str(one.message).splitlines() if 'File "' in line]
            where = re.search(r'File "(?:.*/)?([^/"]+)", line (\d+)', frames[-1]) if frames else None
            return found[1] + (f", called at {where[1]}:{where[2]}" if where else "")
    return None


def _samples_not_finite(output: LossOutput, batch: Batch) -> tuple[str, ...]:
    bad: set[int] = set()
    for name, rows in output.outputs.items():
        if rows.ndim == 2 and not _finite([rows]):
            owners = batch.owners(name)
            bad |= set(owners[~rows.isfinite().all(1)].tolist())
    return tuple(batch.keys[sample] for sample in sorted(bad))


def _shares(state: TrainState, output: LossOutput, batch: Batch) -> tuple[float, ...]:
    """Each sample's part of the contrastive loss, of both directions; nothing where the objective has no `clip`."""
    if not any(isinstance(term, Clip) for term in state.objective.terms.values()):
        return ()
    image, text = (output.outputs[name].double() for name in ("image", "text"))
    ranks, total = state.objective.exchange.count(len(batch))
    if len(image) != len(text) or len(image) != len(batch) or total > _LARGEST_MATRIX:
        return ()
    losses = pair_losses(ranks.gather_constant(image), ranks.gather_constant(text), output.outputs["logit_scale"])
    return tuple((losses / losses.sum())[ranks.local].tolist())


def pair_losses(
    image: Float[Tensor, "pairs dim"], text: Float[Tensor, "pairs dim"], scale: Float[Tensor, "1"]
) -> Float[Tensor, " pairs"]:
    """The cross-entropy of each pair among all, the mean of both directions."""
    logits = scale.to(image) * image @ text.T
    own = logits.diagonal()
    return (logits.logsumexp(1) + logits.logsumexp(0)) / 2 - own


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _tensors(inner)


def _finite(tensors: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())
