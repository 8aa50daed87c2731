"""One micro-batch through the model without memory: what each operation computes and moves, and what is alive when."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vlm.batch import BatchPart, Images, Texts
from vlm.model.dual_encoder import DualEncoder
from vlm.model.shapes import Shapes
from vlm.outputs import is_shared
from vlm.training.precision import Precision

CAPTIONS = 5
"""Captions that a sample is taken to have where a step reads all of them."""
_FREE = ("aten.empty", "aten.detach", "aten.lift_fresh", "prim.", "aten.new_empty", "aten._unsafe_view")


@dataclass
class Phase:
    """A forward or a backward: of each operation its FLOPs and bytes read and written, of each moment what is alive.

    `gradients` are bytes of finished gradients of weights, of which `finished` are just now; `others` all else that was
    allocated since the start.
    """

    flops: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Trace:
    """A micro-batch of `rows` samples: the forward, and the backward.

    `kept` are the bytes that the graph holds between forward and backward, by the part of the model that made them.
    """

    rows: int
    forward: Phase
    backward: Phase
    kept: Mapping[str, float]


def trace_step(
    model: DualEncoder, shapes: Shapes, outputs: frozenset[str], rows: int, length: int, precision: Precision
) -> Trace:
    """The trace of a micro-batch of `rows` images and texts of `length` tokens, for these outputs of the model."""
    parts = _inputs(model, shapes, outputs, rows, length)
    with shapes():
        forward, backward = Phase(), Phase()
        tracker = _Tracker(forward)
        with tracker, tracker.marking_gradients(model):
            with tracker.by_part(model) as kept, _autocast(precision):
                made = model(parts, outputs)
            kept["rest"] = max(0.0, tracker.alive - sum(kept.values()))
            tracker.phase = backward
            tops = [value for name, value in made.items() if value.requires_grad and not is_shared(name)]
            tops = tops or [value for value in made.values() if value.requires_grad]
            del made
            torch.autograd.backward(tops, [torch.ones_like(top) for top in tops])
            del tops
        model.zero_grad()
    return Trace(rows, forward, backward, dict(kept))


def _autocast(precision: Precision) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def _inputs(
    model: DualEncoder, shapes: Shapes, outputs: frozenset[str], rows: int, length: int
) -> dict[str, BatchPart]:
    """Images and texts; as captions a few of each sample, where an output is of them."""
    size = model.image_spec.size

    def texts(count: int, owners: Tensor | None = None) -> Texts:
        lengths = torch.full((count,), length, dtype=torch.int64)
        return Texts(torch.ones(count, length, dtype=torch.int64), lengths, owners=owners)

    parts: dict[str, BatchPart] = {
        "image": Images(shapes.of(rows, 3, size, size, dtype=torch.uint8)),
        "text": texts(rows),
    }
    if any(name.startswith("captions") for name in outputs):
        parts["captions"] = texts(CAPTIONS * rows, torch.arange(rows).repeat_interleave(CAPTIONS))
    return parts


class _Tracker(TorchDispatchMode):
    """The bytes that are alive after each operation, and what it cost."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = phase
        self.alive, self._in_gradients = 0.0, 0.0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._gradients: set[int] = set()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return made
        outputs = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._keep(tensor)
        if outputs and not _is_free(func):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            count = flop_registry.get(func._overloadpacket)
            self.phase.flops.append(count(*args, **(kwargs or {}), out_val=made) if count is not None else 0)
            self.phase.moved.append(sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, *outputs)))
        self.note()
        return made

    def note(self, finished: float = 0.0) -> None:
        """Write down what is alive now."""
        self.phase.finished.append(finished)
        self.phase.gradients.append(self._in_gradients)
        self.phase.others.append(self.alive)

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size:
            return

        def die(_: Any) -> None:
            self._storages.pop(key, None)
            if key in self._gradients:
                self._gradients.discard(key)
                self._in_gradients -= size
            else:
                self.alive -= size

        self._storages[key] = weakref.ref(storage, die)
        self.alive += size

    @contextmanager
    def marking_gradients(self, model: nn.Module) -> Iterator[None]:
        """Count the gradient of a weight apart as soon as it is finished; what is alive before is of the model."""
        known = (*model.parameters(), *model.buffers())
        self._storages |= {tensor.untyped_storage()._cdata: weakref.ref(tensor) for tensor in known}

        def mark(parameter: Tensor) -> None:
            assert parameter.grad is not None
            storage = parameter.grad.untyped_storage()
            if storage._cdata in self._storages and storage._cdata not in self._gradients:
                self._gradients.add(storage._cdata)
                self._in_gradients += storage.nbytes()
                self.alive -= storage.nbytes()
                self.note(storage.nbytes())

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(mark) for parameter in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def by_part(self, model: DualEncoder) -> Iterator[dict[str, float]]:
        """What towers and decoder leave alive behind their forward, by their names."""
        kept: dict[str, float] = {}
        named = {"image tower": model.image, "text tower": model.text, "decoder": model.decoder}
        handles = []
        for name, module in named.items():
            if module is None:
                continue

            def before(*_: Any, name: str = name) -> None:
                kept[name] = kept.get(name, 0.0) - self.alive

            def after(*_: Any, name: str = name) -> None:
                kept[name] += self.alive

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()


def _is_free(func: torch._ops.OpOverload) -> bool:
    """Whether an operation moves nothing: views, and memory that nobody fills."""
    if str(func).startswith(_FREE):
        return True
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)
