"""The contract of engines: what runs forward, backward and step on one or many ranks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.checkpoint.parts import Saved
from vlm.distributed.world import World
from vlm.ends.stops import EvaluationStoppedError
from vlm.outputs import PAIR
from vlm.training.engines.options import EngineOptions, Layout
from vlm.training.optimizers.maker import OptimizerMaker
from vlm.training.precision import Precision


@dataclass(frozen=True)
class EngineSettings:
    """The settings of an engine, the same from the start of its ranks to its last step."""

    name: str
    rows_per_rank: int
    precision: Precision = "fp32"
    max_grad_norm: float | None = None  # None: never clipped
    options: EngineOptions = field(default_factory=EngineOptions)


class Engine(ABC):
    """Runs the model under one way of sharing the work.

    Whatever the engine, weights, moments and gradients have the names of `module`'s parameters and are whole fp32
    tensors where they leave it, which is what makes checkpoints engine-neutral. Methods that say *collective* are
    called by all ranks together.

    `takes` are the options (`EngineOptions`) that an engine follows, by their keys (`wire`, `offload.optimizer`), and
    others are refused. `layout` is how it holds parameters: an optimizer that is not right for it is refused.
    """

    takes: ClassVar[frozenset[str]] = frozenset()
    layout: ClassVar[Layout] = "flat"

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, make_optimizer: OptimizerMaker, settings: EngineSettings
    ) -> None:
        self.accelerator = accelerator
        self.module = module
        self.make_optimizer = make_optimizer
        self.moments = make_optimizer.moments  # by parameter
        self.world = World.current(accelerator.device)
        self.settings = settings
        self.most_norm = math.inf  # a step whose gradient's norm is larger updates nothing
        # Taken before an engine shards the weights: all parameters and persistent buffers, whole.
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in module.state_dict().items()}

    @classmethod
    def build(
        cls, accelerator: Accelerator, module: nn.Module, make_optimizer: OptimizerMaker, settings: EngineSettings
    ) -> "Engine":
        """The engine of a whole module, which is used through it from here on. Collective.

        `make_optimizer` is called when the parameters are as the engine keeps them.
        """
        return cls(accelerator, module, make_optimizer, settings)

    @classmethod
    def configuration(cls, settings: EngineSettings, *, cuda: bool) -> dict[str, Any]:  # noqa: ARG003
        """What a run of these settings tells accelerate and what it drives, as plain values that JSON can hold.

        `accelerate` has the options of its `Accelerator`; an engine adds what it tells others, under their names:
        `deepspeed`, `distributed_data_parallel`, `fully_shard`. The run itself is started and built from this mapping,
        so what is shown of it is what is used. Ask `vlm.training.engines.start.configuration`.
        """
        options = {"cpu": not cuda, "mixed_precision": "no", "gradient_accumulation_steps": 1, "dynamo_backend": "no"}
        return {"accelerate": options}

    @classmethod
    def start_options(cls, settings: EngineSettings, timeout: timedelta, *, cuda: bool) -> dict[str, Any]:
        """The options of accelerate with which the ranks join: those of the configuration, and objects of its own."""
        told = cls.configuration(settings, cuda=cuda)["accelerate"]
        return {**told, "kwargs_handlers": [InitProcessGroupKwargs(timeout=timeout)]}

    def autocast(self) -> torch.autocast:
        """The context in which the model computes under this engine's precision."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

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
    def warm_up(self, batch: Batch, outputs: frozenset[str] = PAIR) -> None:
        """Bring communication into the state that it keeps for the rest of the run; weights stay. Collective.

        `outputs` are those that steps will ask for: all parameters get a gradient from them.
        """

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Run the forward and backward of one micro-batch; gradients are put together over the ranks after the last."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the mean over ranks of `loss`. Collective."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clip, update and clear the gradients; their norm before clipping, the same on all ranks. Collective.

        Where the norm is no finite number, or above `most_norm`, nothing is updated.
        """

    def accepts(self, norm: float) -> bool:
        """Whether a step whose gradient has this norm updates the weights."""
        return math.isfinite(norm) and norm <= self.most_norm

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
    def moment(self, name: str, moment: str) -> Tensor | None:
        """One of the optimizer's `moments` of a parameter, whole; None before the first step. Collective."""

    @abstractmethod
    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:
        """Replace the optimizer's moments (by parameter name) and its count of updates. Collective.

        Each is asked for once, when it is needed: it may be read from a file then.
        """

    @abstractmethod
    def num_updates(self) -> int:
        """How many updates the optimizer has made."""

    @abstractmethod
    def shard(self, name: str) -> Tensor:
        """The part of a parameter that this rank keeps, by reference: what an average of the weights follows."""

    @abstractmethod
    def put_shard(self, name: str, value: Tensor) -> None:
        """Replace the part of a parameter that this rank keeps. Collective."""

    @abstractmethod
    def to_full(self, name: str, shard: Tensor) -> Tensor:
        """The whole tensor whose parts have the layout of `shard(name)`. Collective."""

    @abstractmethod
    def to_shard(self, name: str, full: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in the layout of `shard(name)`."""

    # What a rank writes into a checkpoint: its part of tensors that are cut over ranks, so that none joins the whole.

    def saved_weight(self, name: str) -> Saved:
        """One parameter or persistent buffer: whole, or this rank's part. Collective."""
        return self.weight(name)

    def saved_moment(self, name: str, moment: str) -> Saved | None:
        """One of a parameter's moments: whole, or this rank's part; None before the first step. Collective."""
        return self.moment(name, moment)

    def saved_shard(self, name: str, shard: Tensor) -> Saved:
        """A tensor that has the layout of `shard(name)`: whole, or this rank's part. Collective."""
        return self.to_full(name, shard)

    @contextmanager
    def swapped_weights(self, shards: dict[str, Tensor]) -> Iterator[None]:
        """Run the block with other weights in the module (an average); the training weights come back. Collective.

        They stay away after an error that other ranks may not have: this rank would wait for them, who are elsewhere,
        and is to end.
        """
        training_weights: dict[str, Tensor] = {}
        try:
            for name, value in shards.items():
                training_weights[name] = self.lend(name, value)
            yield
        except BaseException as error:
            if self.world.size == 1 or isinstance(error, EvaluationStoppedError):
                self._take_back(training_weights)
            raise
        self._take_back(training_weights)

    def lend(self, name: str, value: Tensor) -> Tensor:
        """Put `value` in the place of this rank's part of a parameter, for a while; what `take_back` needs. Collective.

        By copies, unless the engine's parameters can point at other values.
        """
        before = self.shard(name).clone()
        self.put_shard(name, value)
        return before

    def take_back(self, name: str, before: Tensor) -> None:
        """Undo `lend`. Collective."""
        self.put_shard(name, before)

    def _take_back(self, training_weights: Mapping[str, Tensor]) -> None:
        for name, before in training_weights.items():
            self.take_back(name, before)


def tensor_of(module: nn.Module, name: str) -> Any:
    """The parameter or buffer of `module` with this dotted name, as the module holds it."""
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def data_of(module: nn.Module, name: str) -> Tensor:
    """The values of a parameter or buffer, outside any graph, by reference."""
    data: Tensor = tensor_of(module, name).data
    return data


def exchange_data(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """Let a parameter point at `value`, without a copy; what it pointed at."""
    parameter = tensor_of(module, name)
    before: Tensor = parameter.data
    parameter.data = value
    return before


def num_updates_of(optimizer: torch.optim.Optimizer) -> int:
    """How many updates an optimizer has made by its own count; 0 where it counts none.

    It is the same for all parameters that it counts: of others the count is that of the last resume.
    """
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
