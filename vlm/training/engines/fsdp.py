"""FSDP2 of torch: weights, gradients and moments sharded over the ranks, gathered block by block."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar
from zlib import crc32

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vlm.batch import Batch
from vlm.checkpoint.parts import Part, Saved
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
from vlm.training.engines.groups import REPLICATE, SHARD, shard_mesh
from vlm.training.engines.options import LAYOUTS, TAKES, EngineOptions, Layout
from vlm.training.engines.rendezvous import stand_alone_rendezvous
from vlm.training.optimizers.maker import OptimizerMaker, set_lr


class FsdpEngine(Engine):
    """Fully sharded data parallelism (Zhao et al., 2023), by torch alone.

    Each tensor is cut along its first dimension; ranks beyond its length keep none of it. Between forward and backward
    nothing stays gathered, so that the module always holds the shards where it is looked at. Where there is a GPU,
    accelerate is told of it by its own plugin; the model is sharded here all the same, as it is on a CPU.
    """

    takes: ClassVar[frozenset[str]] = TAKES["fsdp"]
    layout: ClassVar[Layout] = LAYOUTS["fsdp"]

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, make_optimizer: OptimizerMaker, settings: EngineSettings
    ) -> None:
        super().__init__(accelerator, module, make_optimizer, settings)
        self._mesh = shard_mesh(self.world, settings.options.shard_group)
        how = _fully_shard_options(settings.options, pin_memory=self.world.device.type == "cuda")
        self._root = _sharded(module.to(self.world.device), {"mesh": self._mesh, **how})
        _prefetch(module, settings.options.prefetch)
        self._optimizer = make_optimizer(module)
        self._shards: dict[str, Tensor] = {}
        for name in self.shapes:
            tensor = tensor_of(module, name)
            self._shards[name] = _local(tensor.detach())

    @classmethod
    def configuration(cls, settings: EngineSettings, *, cuda: bool) -> dict[str, Any]:  # noqa: D102
        options = settings.options
        told = {
            "reshard_after_forward": True,
            "cpu_offload": options.offload.parameters == "cpu",
            "mixed_precision_policy": {"reduce_dtype": options.wire},
            "shard_group": options.shard_group,
            "prefetch": options.prefetch,
        }
        return {**super().configuration(settings, cuda=cuda), "fully_shard": told}

    @classmethod
    def start_options(cls, settings: EngineSettings, timeout: timedelta, *, cuda: bool) -> dict[str, Any]:  # noqa: D102
        stand_alone_rendezvous()
        options = super().start_options(settings, timeout, cuda=cuda)
        return {**options, "fsdp_plugin": fsdp_plugin(settings)} if cuda else options

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
        squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum().to(self.world.device)
        dist.all_reduce(squares, group=self._mesh.get_group(SHARD))  # other groups have the same gradients
        norm = float(squares.sqrt())
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

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:  # noqa: D102
        for name, parameter in self.parameters().items():
            values = {moment: self._kept(name, moment, moments[name][moment]) for moment in self.moments[name]}
            state = self.make_optimizer.state_of(values, num_updates, self._shards[name].device)
            self._optimizer.state[parameter] = state

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
            chunks, place = full.chunk(self._mesh[SHARD].size()), self._mesh.get_local_rank(SHARD)
            full = chunks[place] if place < len(chunks) else full[:0]
        return full.to(self._shards[name].device)

    def saved_weight(self, name: str) -> Saved:  # noqa: D102
        return self.saved_shard(name, self._shards[name])

    def saved_moment(self, name: str, moment: str) -> Saved | None:  # noqa: D102
        values: Tensor | None = self._optimizer.state.get(self.parameters()[name], {}).get(moment)
        if not isinstance(values, DTensor):
            return values  # of another shape than the parameter's: every rank has it whole
        return self.saved_shard(name, values.to_local())

    def saved_shard(self, name: str, shard: Tensor) -> Saved:  # noqa: D102
        if not isinstance(tensor_of(self.module, name), DTensor):
            return shard
        shape, flat = self.shapes[name], shard.detach().reshape(-1)
        rows = math.ceil(shape[0] / self._mesh[SHARD].size())  # of all ranks but the last that has any
        start = min(shape[0], rows * self._mesh.get_local_rank(SHARD)) * torch.Size(shape[1:]).numel()
        return Part(flat if self._writes(name) else flat[:0], start, shape)

    def _kept(self, name: str, moment: str, whole: Tensor) -> Tensor:
        """A moment as the optimizer keeps it: this rank's rows, or all of it where it has not the parameter's shape."""
        if self.moments[name][moment].shape != self.shapes[name]:
            return whole.to(self._shards[name].device)
        return self._distributed(name, self.to_shard(name, whole).clone())

    def _writes(self, name: str) -> bool:
        """Whether this rank's group of those that have the same shards writes a tensor: they share the work."""
        if REPLICATE not in (self._mesh.mesh_dim_names or ()):
            return True
        return crc32(name.encode()) % self._mesh[REPLICATE].size() == self._mesh.get_local_rank(REPLICATE)

    def _distributed(self, name: str, shard: Tensor) -> Tensor:
        """A tensor over all ranks with the layout of a parameter or buffer, of which this rank has `shard`."""
        like = tensor_of(self.module, name)
        return _like(like, shard) if isinstance(like, DTensor) else shard


def fsdp_plugin(settings: EngineSettings) -> FullyShardedDataParallelPlugin:
    """What accelerate is told of a run under FSDP2; it wraps nothing, for the model comes sharded."""
    told = FsdpEngine.configuration(settings, cuda=True)["fully_shard"]
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=told["reshard_after_forward"],
        cpu_offload=told["cpu_offload"],
        mixed_precision_policy=_mixed_precision(settings.options),
        auto_wrap_policy="no_wrap",
        activation_checkpointing=False,  # blocks do it themselves
        cpu_ram_efficient_loading=False,
    )


def _fully_shard_options(options: EngineOptions, *, pin_memory: bool) -> dict[str, Any]:
    policy = CPUOffloadPolicy(pin_memory=pin_memory) if options.offload.parameters == "cpu" else OffloadPolicy()
    return {"reshard_after_forward": True, "mp_policy": _mixed_precision(options), "offload_policy": policy}


def _mixed_precision(options: EngineOptions) -> MixedPrecisionPolicy:
    """Towers compute by autocast; this is for the sum over ranks alone."""
    return MixedPrecisionPolicy(
        reduce_dtype=torch.bfloat16 if options.wire == "bf16" else None, cast_forward_inputs=False
    )


def _blocks_by_part(module: nn.Module) -> list[list[Any]]:
    return [list(child.blocks()) for child in module.children() if isinstance(child, Tower | Decoder)]


def _prefetch(module: nn.Module, count: int | None) -> None:
    """Gather so many blocks of a part ahead, in the forward and in the backward; None: as torch does by itself."""
    if count is None:
        return
    for blocks in _blocks_by_part(module):
        for place, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[place + 1 : place + 1 + count])
            block.set_modules_to_backward_prefetch(blocks[max(0, place - count) : place][::-1])


def _sharded(module: nn.Module, options: dict[str, Any]) -> FSDPModule:
    """Shard a model's parts: the blocks of towers, then the parts themselves, then what the model holds itself.

    Raises EveryRankError for a model whose parts share parameters.
    """
    modules = [
        child for child in module.children() if not isinstance(child, nn.ParameterDict) and list(child.parameters())
    ]
    for child in modules:
        for block in child.blocks() if isinstance(child, Tower | Decoder) else ():
            fully_shard(block, **options)
        fully_shard(child, **options)
    root: Any = fully_shard(module, **options)
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
    """A tensor, whole; what lies on the CPU is gathered by the device of the mesh."""
    if not isinstance(tensor, DTensor):
        return tensor
    shard = tensor.to_local()
    device = tensor.device_mesh.device_type
    return (tensor if shard.device.type == device else _like(tensor, shard.to(device))).full_tensor()


def _like(like: DTensor, shard: Tensor) -> DTensor:
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
