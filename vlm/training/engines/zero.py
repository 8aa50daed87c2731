"""DeepSpeed's ZeRO stages 1 to 3, driven directly: backward, inspect, step."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar, Literal

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import GatheredParameters, parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from vlm.batch import Batch
from vlm.checkpoint.parts import Part, Saved
from vlm.outputs import PAIR
from vlm.training.engines.base import (
    Engine,
    EngineSettings,
    data_of,
    exchange_data,
    num_updates_of,
    tensor_of,
)
from vlm.training.engines.options import LAYOUTS, TAKES, Layout
from vlm.training.engines.rendezvous import stand_alone_rendezvous
from vlm.training.optimizers.maker import OptimizerMaker, set_lr

Stage = Literal[1, 2, 3]


_BUCKET_MIB = 200
_BYTES = 4  # of a gradient


def deepspeed_config(stage: Stage, settings: EngineSettings, *, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for fp32 master weights, bf16 by autocast, and gradients that travel as they are told.

    `torch_autocast` without low-precision modules keeps the weights in fp32; `bf16.enabled` would cast them. Clipping
    is always written: `auto` silently becomes 1.0.
    """
    options = settings.options
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": options.overlap is not False,
        "reduce_bucket_size": (options.bucket_mib or _BUCKET_MIB) * 2**20 // _BYTES,
    }
    if options.offload.optimizer is not None:
        zero["offload_optimizer"] = {"device": options.offload.optimizer, "pin_memory": cuda}
    if options.offload.parameters is not None:
        zero["offload_param"] = {"device": options.offload.parameters, "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": settings.rows_per_rank,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if settings.max_grad_norm is None else settings.max_grad_norm,
        "communication_data_type": options.wire,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the recipe's own optimizer updates on the CPU too
        "torch_autocast": {
            "enabled": settings.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**9,
    }


class ZeroEngine(Engine):
    """ZeRO: moments (stage 1), gradients (2) and weights (3) sharded over the ranks (Rajbhandari et al., 2020)."""

    takes: ClassVar[frozenset[str]] = TAKES["zero1"]
    layout: ClassVar[Layout] = LAYOUTS["zero1"]
    _stage: Stage

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, make_optimizer: OptimizerMaker, settings: EngineSettings
    ) -> None:
        super().__init__(accelerator, module, make_optimizer, settings)
        # DeepSpeed shards an optimizer's parameters itself.
        self._engine, self._prepared = accelerator.prepare(module, make_optimizer(module))
        self._zero: Any = self._engine.optimizer
        self._base: torch.optim.Optimizer = self._zero.optimizer
        self._linked = False
        self._refused: float | None = None  # the norm of a step that was refused
        self._let_refuse()

    @classmethod
    def configuration(cls, settings: EngineSettings, *, cuda: bool) -> dict[str, Any]:  # noqa: D102
        told = super().configuration(settings, cuda=cuda)
        # `cpu=True` would silently switch DeepSpeed off and fall back to DDP.
        options = {name: value for name, value in told["accelerate"].items() if name != "cpu"}
        return {"accelerate": options, "deepspeed": deepspeed_config(cls._stage, settings, cuda=cuda)}

    @classmethod
    def start_options(cls, settings: EngineSettings, timeout: timedelta, *, cuda: bool) -> dict[str, Any]:  # noqa: D102
        if not cuda:
            _use_deepspeed_on_cpu()
        stand_alone_rendezvous()
        told = cls.configuration(settings, cuda=cuda)
        plugin = DeepSpeedPlugin(
            zero3_init_flag=False,  # the model is whole when the engine gets it
            hf_ds_config=told["deepspeed"],
        )
        backend = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=timeout)
        return {**told["accelerate"], "deepspeed_plugin": plugin, "kwargs_handlers": [backend]}

    @property
    def wrapped(self) -> nn.Module:  # noqa: D102
        return self._engine  # type: ignore[no-any-return]

    def warm_up(self, batch: Batch, outputs: frozenset[str] = PAIR) -> None:
        """Nothing to do: ZeRO's sums have the same order from the first step on."""

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:  # noqa: D102
        self._engine.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: Tensor) -> None:  # noqa: D102
        self._engine.backward(loss)

    def step(self, lr: float) -> float:  # noqa: D102
        set_lr(self._zero.param_groups, lr)
        self._refused = None
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._refused is None else self._refused

    def _let_refuse(self) -> None:
        """Let DeepSpeed take a norm above `most_norm` for one that overflowed: it clears up and updates nothing."""
        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        norm_of = getattr(self._zero, name)

        def judged(*arguments: Any) -> Any:
            found = norm_of(*arguments)
            if math.isinf(self.most_norm):
                return found
            norm = combine_grad_norm_groups(found) if self._stage == 3 else found
            if self.accepts(float(norm)) or not math.isfinite(norm):
                return found
            self._refused = float(norm)
            overflowed = torch.full_like(norm, math.inf)
            return [overflowed] if self._stage == 3 else overflowed

        setattr(self._zero, name, judged)

    def gradient(self, name: str) -> Tensor:  # noqa: D102
        return safe_get_full_grad(self.parameters()[name]).clone()  # type: ignore[no-any-return]

    def weight(self, name: str) -> Tensor:  # noqa: D102
        tensor = tensor_of(self.module, name)
        if not hasattr(tensor, "ds_id"):
            return data_of(self.module, name)
        with GatheredParameters([tensor]):
            full: Tensor = tensor.data.clone()
            return full

    def load_weight(self, name: str, value: Tensor) -> None:  # noqa: D102
        tensor = tensor_of(self.module, name)
        self.put_shard(name, self.to_shard(name, value))
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            self._set_master(name, tensor, value, None)

    def moment(self, name: str, moment: str) -> Tensor | None:  # noqa: D102
        if not self._base.state:
            return None
        self._link_moments()
        return safe_get_full_optimizer_state(self.parameters()[name], moment)  # type: ignore[no-any-return]

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:  # noqa: D102
        for master in self._master_parts():
            zeros = {moment: torch.zeros_like(master) for moment in self.make_optimizer.config.moments}
            self._base.state[master] = self.make_optimizer.state_of(zeros, num_updates, master.device)
        self._link_moments(again=True)
        for name, parameter in self.parameters().items():
            for moment in self.moments[name]:
                self._set_master(name, parameter, moments[name][moment], moment)

    def num_updates(self) -> int:  # noqa: D102
        return num_updates_of(self._base)

    def shard(self, name: str) -> Tensor:  # noqa: D102
        tensor = tensor_of(self.module, name)
        shard: Tensor = tensor.ds_tensor.data if hasattr(tensor, "ds_id") else tensor.data
        return shard

    def put_shard(self, name: str, value: Tensor) -> None:  # noqa: D102
        tensor = tensor_of(self.module, name)
        if not hasattr(tensor, "ds_id"):
            tensor.data.copy_(value)
            return
        tensor.ds_tensor.data.copy_(value)
        if tensor.ds_status == ZeroParamStatus.AVAILABLE:  # small weights stay gathered between steps
            tensor.data.copy_(self.to_full(name, value))

    def lend(self, name: str, value: Tensor) -> Tensor:  # noqa: D102
        return super().lend(name, value) if self._stage == 3 else exchange_data(self.module, name, value)

    def take_back(self, name: str, before: Tensor) -> None:  # noqa: D102
        if self._stage == 3:
            super().take_back(name, before)
        else:
            exchange_data(self.module, name, before)

    def to_full(self, name: str, shard: Tensor) -> Tensor:  # noqa: D102
        tensor = tensor_of(self.module, name)
        if not hasattr(tensor, "ds_id"):
            return shard
        shard = shard.to(self.world.device).contiguous()
        flat = shard.new_empty(shard.numel() * self.world.size)
        dist.all_gather_into_tensor(flat, shard)
        return flat[: tensor.ds_numel].view(tensor.ds_shape)

    def to_shard(self, name: str, full: Tensor) -> Tensor:  # noqa: D102
        tensor = tensor_of(self.module, name)
        if not hasattr(tensor, "ds_id"):
            return full.to(self.world.device)
        size = tensor.ds_tensor.numel()
        padded = torch.zeros(size * self.world.size, dtype=full.dtype)
        padded[: full.numel()] = full.flatten()
        return padded[self.world.rank * size :][:size].to(self.world.device)

    def saved_weight(self, name: str) -> Saved:  # noqa: D102
        return self.saved_shard(name, self.shard(name))

    def saved_moment(self, name: str, moment: str) -> Saved | None:  # noqa: D102
        if not self._base.state:
            return None
        parameter = self.parameters()[name]
        if self._stage == 3:
            return self.saved_shard(name, safe_get_local_optimizer_state(parameter, moment))
        self._link_moments()
        fragment: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is None:  # other ranks have all of it
            return Part(torch.empty(0), 0, self.shapes[name])
        return Part(fragment.get_hp_fragment(moment).detach(), fragment.lp_fragment_address.start, self.shapes[name])

    def saved_shard(self, name: str, shard: Tensor) -> Saved:  # noqa: D102
        tensor = tensor_of(self.module, name)
        if not hasattr(tensor, "ds_id"):
            return shard
        start = self.world.rank * shard.numel()  # the last ones are padded
        return Part(shard.detach().reshape(-1)[: max(0, tensor.ds_numel - start)], start, self.shapes[name])

    def _set_master(self, name: str, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Write a master weight (no `moment`) or a moment; stage 3 by parts, its setter of wholes fails on padding."""
        if self._stage == 3:
            shard = self.to_shard(name, value)
            if moment is None:
                safe_set_local_fp32_param(parameter, shard)
            else:
                safe_set_local_optimizer_state(parameter, shard, moment)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value.to(self.world.device))
        else:
            safe_set_full_optimizer_state(parameter, value.to(self.world.device), moment)

    def _link_moments(self, *, again: bool = False) -> None:
        """Tell parameters where their moments are: DeepSpeed does it when only the first group has any."""
        if self._stage < 3 and (again or not self._linked):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
            self._linked = True

    def _master_parts(self) -> list[Tensor]:
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)


class Zero1Engine(ZeroEngine):
    """Moments sharded."""

    _stage = 1


class Zero2Engine(ZeroEngine):
    """Moments and gradients sharded."""

    _stage = 2


class Zero3Engine(ZeroEngine):
    """Moments, gradients and weights sharded."""

    takes: ClassVar[frozenset[str]] = TAKES["zero3"]
    _stage = 3

    def step(self, lr: float) -> float:  # noqa: D102
        norm = super().step(lr)
        # A block that is computed again is left where the backward has what it wants: modules that it began in stay
        # in DeepSpeed's stack, which would grow with every step.
        del parameter_offload.FWD_MODULE_STACK[1:]
        return norm


def _use_deepspeed_on_cpu() -> None:
    """Tell DeepSpeed that there is no accelerator, and keep it from compiling what training never calls."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Its all-reduce in shared memory serves inference alone, and building it takes a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
