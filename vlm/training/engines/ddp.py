"""Whole weights on every rank: one process, or DistributedDataParallel on several."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DDPCommunicationHookType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlm.batch import Batch
from vlm.outputs import PAIR, loss_with
from vlm.training.engines.base import (
    Engine,
    EngineSettings,
    data_of,
    exchange_data,
    num_updates_of,
)
from vlm.training.engines.options import LAYOUTS, TAKES, Layout
from vlm.training.optimizers.maker import OptimizerMaker, set_lr

_BUCKET_MIB = 25


class DdpEngine(Engine):
    """Data parallelism with whole weights on every rank, wrapped by accelerate.

    Gradients travel in buckets while the backward goes on, and lie in them afterwards (`gradient_as_bucket_view`: no
    second copy). The graph is not said to be static: every parameter gets a gradient, so there is nothing to gain, and
    which parts of a batch there are may change from one step to the next.
    """

    takes: ClassVar[frozenset[str]] = TAKES["ddp"]
    layout: ClassVar[Layout] = LAYOUTS["ddp"]

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, make_optimizer: OptimizerMaker, settings: EngineSettings
    ) -> None:
        super().__init__(accelerator, module, make_optimizer, settings)
        self._wrapped = accelerator.prepare(module)
        self._optimizer = make_optimizer(module)

    @classmethod
    def configuration(cls, settings: EngineSettings, *, cuda: bool) -> dict[str, Any]:  # noqa: D102
        options = {
            "bucket_cap_mb": settings.options.bucket_mib or _BUCKET_MIB,
            "gradient_as_bucket_view": True,
            "find_unused_parameters": False,
            "static_graph": False,
            "comm_hook": "bf16" if settings.options.wire == "bf16" else "no",
        }
        return {**super().configuration(settings, cuda=cuda), "distributed_data_parallel": options}

    @classmethod
    def start_options(cls, settings: EngineSettings, timeout: timedelta, *, cuda: bool) -> dict[str, Any]:  # noqa: D102
        told = dict(cls.configuration(settings, cuda=cuda)["distributed_data_parallel"])
        hook = DDPCommunicationHookType(told.pop("comm_hook"))
        options = super().start_options(settings, timeout, cuda=cuda)
        options["kwargs_handlers"].append(DistributedDataParallelKwargs(**told, comm_hook=hook))
        return options

    @property
    def wrapped(self) -> nn.Module:  # noqa: D102
        return self._wrapped  # type: ignore[no-any-return]

    def warm_up(self, batch: Batch, outputs: frozenset[str] = PAIR) -> None:
        """DDP rebuilds its buckets, and with them the order of its sums, after the first backward: get that over."""
        if self.world.size == 1:
            return
        self.backward(loss_with({}, self.forward(batch, outputs)))
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
        limit = self.settings.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters().values()), math.inf if limit is None else limit))
        if self.accepts(norm):
            set_lr(self._optimizer.param_groups, lr)
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def gradient(self, name: str) -> Tensor:  # noqa: D102
        parameter = self.parameters()[name]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()

    def weight(self, name: str) -> Tensor:  # noqa: D102
        return data_of(self.module, name)

    def load_weight(self, name: str, value: Tensor) -> None:  # noqa: D102
        data_of(self.module, name).copy_(value)

    def moment(self, name: str, moment: str) -> Tensor | None:  # noqa: D102
        values: Tensor | None = self._optimizer.state.get(self.parameters()[name], {}).get(moment)
        return values

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:  # noqa: D102
        for name, parameter in self.parameters().items():
            values = {moment: moments[name][moment].to(parameter.device) for moment in self.moments[name]}
            state = self.make_optimizer.state_of(values, num_updates, parameter.device)
            self._optimizer.state[parameter] = state

    def num_updates(self) -> int:  # noqa: D102
        return num_updates_of(self._optimizer)

    def shard(self, name: str) -> Tensor:  # noqa: D102
        return data_of(self.module, name)

    def put_shard(self, name: str, value: Tensor) -> None:  # noqa: D102
        data_of(self.module, name).copy_(value)

    def lend(self, name: str, value: Tensor) -> Tensor:  # noqa: D102
        return exchange_data(self.module, name, value)

    def take_back(self, name: str, before: Tensor) -> None:  # noqa: D102
        exchange_data(self.module, name, before)

    def to_full(self, name: str, shard: Tensor) -> Tensor:  # noqa: D102, ARG002
        return shard

    def to_shard(self, name: str, full: Tensor) -> Tensor:  # noqa: D102, ARG002
        return full.to(self.world.device)
