"""The contract of engines: what runs forward, backward and step on one or many ranks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlm.batch import Batch
from vlm.ends.stops import EvaluationStoppedError
from vlm.outputs import PAIR, loss_with
from vlm.training.optimizer import set_lr
from vlm.world import World

EngineName = Literal["ddp", "zero1", "zero2", "zero3"]
Precision = Literal["fp32", "bf16"]
Moment = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Moment, ...] = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """Runs the model under one way of sharing the work.

    Whatever the engine, weights, moments and gradients have the names of `module`'s parameters and are whole fp32
    tensors where they leave it, which is what makes checkpoints engine-neutral. Methods that say *collective* are
    called by all ranks together.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, precision: Precision) -> None:
        self.accelerator = accelerator
        self.module = module
        self.world = World.current(accelerator.device)
        self.precision = precision
        # Taken before an engine shards the weights: all parameters and persistent buffers, whole.
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in module.state_dict().items()}

    def autocast(self) -> torch.autocast:
        """The context in which the model computes under this engine's precision."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self, batch: Batch, outputs: frozenset[str]) -> dict[str, Tensor]:
        """The model's outputs of these names, through the wrapper that synchronises gradients. Collective.

        Those of a part that the batch does not bring are left out.
        """
        with self.autocast():
            made: dict[str, Tensor] = self.wrapped(batch.parts, outputs)
            return made

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @property
    @abstractmethod
    def wrapped(self) -> nn.Module:
        """The model as the engine wants it called in training."""

    @abstractmethod
    def warm_up(self, batch: Batch) -> None:
        """Bring communication into the state that it keeps for the rest of the run; weights stay. Collective."""

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Run the forward and backward of one micro-batch; gradients are put together over the ranks after the last."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the mean over ranks of `loss`. Collective."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clip, update and clear the gradients; their norm before clipping, the same on all ranks. Collective.

        Where the norm is no finite number, nothing is updated.
        """

    @abstractmethod
    def gradient(self, name: str) -> Tensor:
        """The averaged gradient of one parameter, whole, between backward and step. Collective."""

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """One parameter or persistent buffer, whole. Collective."""

    @abstractmethod
    def load_weight(self, name: str, value: Tensor) -> None:
        """Replace one parameter or persistent buffer by a whole tensor. Collective."""

    @abstractmethod
    def moment(self, name: str, kind: Moment) -> Tensor | None:
        """One of AdamW's moments of a parameter, whole; None before the first step. Collective."""

    @abstractmethod
    def load_moments(self, moments: dict[str, dict[Moment, Tensor]], num_updates: int) -> None:
        """Replace AdamW's moments (by parameter name) and its count of updates. Collective."""

    @abstractmethod
    def num_updates(self) -> int:
        """How many updates AdamW has made."""

    @abstractmethod
    def shard(self, name: str) -> Tensor:
        """The part of a parameter that this rank keeps, by reference: what an average of the weights follows."""

    @abstractmethod
    def put_shard(self, name: str, value: Tensor) -> None:
        """Replace the part of a parameter that this rank keeps. Collective."""

    @abstractmethod
    def whole(self, name: str, shard: Tensor) -> Tensor:
        """The whole tensor whose parts have the layout of `shard(name)`. Collective."""

    @abstractmethod
    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in the layout of `shard(name)`."""

    @contextmanager
    def holding(self, shards: dict[str, Tensor]) -> Iterator[None]:
        """Run the block with other weights in the module (an average); the training weights come back. Collective.

        They stay away after an error that other ranks may not have: this rank would wait for them, who are elsewhere,
        and is to end.
        """
        kept = {name: self.shard(name).clone() for name in shards}
        try:
            self._put_shards(shards)
            yield
        except BaseException as error:
            if self.world.size == 1 or isinstance(error, EvaluationStoppedError):
                self._put_shards(kept)
            raise
        self._put_shards(kept)

    def _put_shards(self, shards: Mapping[str, Tensor]) -> None:
        for name, value in shards.items():
            self.put_shard(name, value)


class ReplicatedEngine(Engine):
    """Whole weights on every rank: one process, or DistributedDataParallel on several."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.AdamW,
        precision: Precision,
        max_grad_norm: float | None,
    ) -> None:
        super().__init__(accelerator, module, precision)
        self._wrapped, self._prepared = accelerator.prepare(module, optimizer)
        self._optimizer = optimizer
        self._max_norm = float("inf") if max_grad_norm is None else max_grad_norm

    @property
    def wrapped(self) -> nn.Module:  # noqa: D102
        return self._wrapped  # type: ignore[no-any-return]

    def warm_up(self, batch: Batch) -> None:
        """DDP rebuilds its buckets, and with them the order of its sums, after the first backward: get that over."""
        if self.world.size == 1:
            return
        self.backward(loss_with({}, self.forward(batch, PAIR)))
        self._optimizer.zero_grad()

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:  # noqa: D102
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            yield
            return
        with self._wrapped.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:  # noqa: D102
        self.accelerator.backward(loss)

    def step(self, lr: float) -> float:  # noqa: D102
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters().values()), self._max_norm))
        if math.isfinite(norm):
            set_lr(self._optimizer.param_groups, lr)
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def gradient(self, name: str) -> Tensor:  # noqa: D102
        parameter = self.parameters()[name]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()

    def weight(self, name: str) -> Tensor:  # noqa: D102
        return held_data(self.module, name)

    def load_weight(self, name: str, value: Tensor) -> None:  # noqa: D102
        held_data(self.module, name).copy_(value)

    def moment(self, name: str, kind: Moment) -> Tensor | None:  # noqa: D102
        moment: Tensor | None = self._optimizer.state.get(self.parameters()[name], {}).get(kind)
        return moment

    def load_moments(self, moments: dict[str, dict[Moment, Tensor]], num_updates: int) -> None:  # noqa: D102
        for name, parameter in self.parameters().items():
            state = self._optimizer.state[parameter]
            state["step"] = torch.tensor(float(num_updates), device=parameter.device)
            for kind in MOMENTS:
                state[kind] = moments[name][kind].to(parameter.device)

    def num_updates(self) -> int:  # noqa: D102
        return num_updates_of(self._optimizer)

    def shard(self, name: str) -> Tensor:  # noqa: D102
        return held_data(self.module, name)

    def put_shard(self, name: str, value: Tensor) -> None:  # noqa: D102
        held_data(self.module, name).copy_(value)

    def whole(self, name: str, shard: Tensor) -> Tensor:  # noqa: D102, ARG002
        return shard

    def cut(self, name: str, whole: Tensor) -> Tensor:  # noqa: D102, ARG002
        return whole.to(self.world.device)


def held_tensor(module: nn.Module, name: str) -> Any:
    """The parameter or buffer of `module` with this dotted name, as the module holds it."""
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def held_data(module: nn.Module, name: str) -> Tensor:
    """The values of a parameter or buffer, outside any graph, by reference."""
    data: Tensor = held_tensor(module, name).data
    return data


def num_updates_of(optimizer: torch.optim.Optimizer) -> int:
    """How many updates AdamW has made: its own count, the same for all parameters."""
    counts = {int(state["step"]) for state in optimizer.state.values()}
    return counts.pop() if counts else 0
