"""Networks without memory: parameters and activations are shapes, and what a step would take can be looked at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WHOLE = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool})


class Shapes:
    """A place where floating tensors are shapes of the meta device that answer as if they were on the CPU.

    Whole numbers (tokens, lengths, places) stay real, since shapes depend on them: only what comes of a shape alone is
    one. On the meta device itself there is no autocast, and attention would fall back to the whole matrix.
    """

    def __init__(self) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Compute within the place."""
        with self._fake, _RealWholeNumbers():  # type: ignore[no-untyped-call]
            yield

    def of(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A shape."""
        with self._fake:
            return torch.empty(size, dtype=dtype)

    def adopt(self, module: nn.Module) -> None:
        """Let a module's parameters, wherever they lie, and its floating buffers be shapes."""
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and not isinstance(parameter, FakeTensor):
                    shape = self.of(*parameter.shape, dtype=parameter.dtype)
                    owner._parameters[name] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
            for name, buffer in owner._buffers.items():
                if buffer is not None and buffer.is_floating_point() and not isinstance(buffer, FakeTensor):
                    owner._buffers[name] = self.of(*buffer.shape, dtype=buffer.dtype)


class _RealWholeNumbers(TorchDispatchMode):
    """What no shape enters, and what makes whole numbers of nothing, is computed for real."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is torch.ops.aten.index.Tensor:  # the places that a real mask means are known
                args = (args[0], [place for index in args[1] for place in _places(index)])
            return func(*args, **kwargs)
        if tensors or kwargs.get("dtype") in _WHOLE or _counts(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _places(index: Tensor | None) -> list[Tensor | None]:
    if index is None or isinstance(index, FakeTensor) or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    with unset_fake_temporarily():
        return list(index.nonzero().unbind(1))


def _counts(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether these are whole numbers whose type nobody wrote."""
    aten = torch.ops.aten
    if kwargs.get("dtype") is not None:
        return False
    if func in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        return all(isinstance(bound, int) for bound in args)
    return func is aten.full.default and isinstance(args[1], int)
