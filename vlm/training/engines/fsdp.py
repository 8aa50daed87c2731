"""FSDP2 of torch: weights, gradients and moments sharded over the ranks, gathered block by block."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from vlm.batch import Batch
from vlm.errors import EveryRankError, reason
from vlm.model.captioner import Decoder
from vlm.model.towers import Tower
from vlm.outputs import PAIR
from vlm.training.engines.base import (
    Engine,
    EngineSettings,
    num_updates_of,
    tensor_of,
)
from vlm.training.engines.rendezvous import stand_alone_rendezvous
from vlm.training.optimizers import OptimizerMaker, set_lr


class FsdpEngine(Engine):
    """Fully sharded data parallelism (Zhao et al., 2023), by torch alone.

    Each tensor is cut along its first dimension; ranks beyond its length keep none of it. Between forward and backward
    nothing stays gathered, so that the module always holds the shards where it is looked at.
    """

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, make_optimizer: OptimizerMaker, settings: EngineSettings
    ) -> None:
        super().__init__(accelerator, module, make_optimizer, settings)
        self._mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        self._root = _sharded(module.to(self.world.device), self._mesh)
        self._optimizer = make_optimizer(module)
        self._shards: dict[str, Tensor] = {}
        for name in self.shapes:
            tensor = tensor_of(module, name)
            self._shards[name] = _local(tensor.detach())

    @classmethod
    def start_options(cls, settings: EngineSettings, timeout: timedelta, *, cuda: bool) -> dict[str, Any]:  # noqa: D102
        stand_alone_rendezvous()
        return super().start_options(settings, timeout, cuda=cuda)

    @property
    def wrapped(self) -> nn.Module:  # noqa: D102
        return self.module

    def warm_up(self, batch: Batch, outputs: frozenset[str] = PAIR) -> None:
        """Nothing to do: its sums have the same order from the first step on."""

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:  # noqa: D102
        self._root.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:  # noqa: D102
        loss.backward()

    @torch.no_grad()
    def step(self, lr: float) -> float:  # noqa: D102
        gradients = [_local(p.grad) for p in self.parameters().values() if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        norm = float(self.world.sum(squares).sqrt())
        if self.accepts(norm):
            limit = self.settings.max_grad_norm
            if limit is not None and norm > limit:
                torch._foreach_mul_(gradients, limit / norm)
            set_lr(self._optimizer.param_groups, lr)
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def gradient(self, name: str) -> Tensor:  # noqa: D102
        gradient = self.parameters()[name].grad
        if gradient is None:
            return torch.zeros(self.shapes[name], device=self.world.device)
        return _full(gradient).clone()

    def weight(self, name: str) -> Tensor:  # noqa: D102
        return _full(tensor_of(self.module, name).detach())

    def load_weight(self, name: str, value: Tensor) -> None:  # noqa: D102
        self.put_shard(name, self.to_shard(name, value))

    def moment(self, name: str, moment: str) -> Tensor | None:  # noqa: D102
        values: Tensor | None = self._optimizer.state.get(self.parameters()[name], {}).get(moment)
        return None if values is None else _full(values)

    def load_moments(self, moments: dict[str, dict[str, Tensor]], num_updates: int) -> None:  # noqa: D102
        for name, parameter in self.parameters().items():
            state = self._optimizer.state[parameter]
            state["step"] = torch.tensor(float(num_updates), device=self.world.device)
            for moment in self.moments:
                state[moment] = self._distributed(name, self.to_shard(name, moments[name][moment]).clone())

    def num_updates(self) -> int:  # noqa: D102
        return num_updates_of(self._optimizer)

    def shard(self, name: str) -> Tensor:  # noqa: D102
        return self._shards[name]

    def put_shard(self, name: str, value: Tensor) -> None:  # noqa: D102
        self._shards[name].copy_(value)

    def to_full(self, name: str, shard: Tensor) -> Tensor:  # noqa: D102
        return _full(self._distributed(name, shard))

    def to_shard(self, name: str, full: Tensor) -> Tensor:  # noqa: D102
        if isinstance(tensor_of(self.module, name), DTensor):
            chunks = full.chunk(self.world.size)
            full = chunks[self.world.rank] if self.world.rank < len(chunks) else full[:0]
        return full.to(self.world.device)

    def _distributed(self, name: str, shard: Tensor) -> Tensor:
        """A tensor over all ranks with the layout of a parameter or buffer, of which this rank has `shard`."""
        like = tensor_of(self.module, name)
        if not isinstance(like, DTensor):
            return shard
        return DTensor.from_local(
            shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def _sharded(module: nn.Module, mesh: DeviceMesh) -> FSDPModule:
    """Shard a model's parts: the blocks of towers, then the parts themselves, then what the model holds itself.

    Raises EveryRankError for a model whose parts share parameters.
    """
    modules = [
        child for child in module.children() if not isinstance(child, nn.ParameterDict) and list(child.parameters())
    ]
    for child in modules:
        for block in child.blocks() if isinstance(child, Tower | Decoder) else ():
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(child, mesh=mesh, reshard_after_forward=True)
    root: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for outermost in (module, *modules):
        # Outputs that are views are said to be in danger of changes in place: those of model and towers see none.
        message = rf"FSDP2-wrapped module \({type(outermost).__name__}\) returned a view"
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    try:
        with torch.no_grad():
            module({}, frozenset())  # the first to run is the root, and an evaluation may run a tower first
    except ValueError as error:
        raise EveryRankError(f"engine: fsdp cannot shard this model: {reason(error)}") from error
    return root  # type: ignore[no-any-return]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
