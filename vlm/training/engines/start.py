"""Choose and start the engine that a recipe names."""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from torch import nn

from vlm.training.engines.base import Engine, EngineName, Precision, ReplicatedEngine
from vlm.training.launcher_settings import overrule_launcher

_LEAST_MEETING, _MOST_MEETING = 60.0, 600.0  # seconds
_STAGES: dict[EngineName, Literal[1, 2, 3]] = {"zero1": 1, "zero2": 2, "zero3": 3}


def start_accelerator(
    engine: EngineName,
    *,
    rows_per_rank: int,
    precision: Precision,
    max_grad_norm: float | None,
    trackers: tuple[str, ...] = (),
    run: Path | None = None,
    patience: float = 1800.0,
) -> Accelerator:
    """Join the other ranks (gloo on CPU, NCCL on GPU) under accelerate, with DeepSpeed where the engine asks for it.

    Every setting is said here: what a launcher or its configuration file says otherwise changes nothing. Precision is
    the engine's own autocast, and micro-batches are the trainer's. The other ranks are waited for as long as `patience`
    says, but for a minute at least: they start at different times.
    """
    overrule_launcher(engine, precision)
    waiting = timedelta(seconds=min(max(patience, _LEAST_MEETING), _MOST_MEETING))
    project = ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "tensorboard")) if run else None
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    said: dict[str, Any] = {
        "mixed_precision": "no",
        "gradient_accumulation_steps": 1,
        "dynamo_backend": "no",
        "log_with": list(trackers) or None,
        "project_config": project,
    }
    if engine == "ddp":
        return Accelerator(cpu=not cuda, kwargs_handlers=[InitProcessGroupKwargs(timeout=waiting)], **said)
    if not cuda:
        _use_deepspeed_on_cpu()
    from vlm.training.engines.zero import deepspeed_config

    _stand_alone_rendezvous()
    plugin = DeepSpeedPlugin(
        zero3_init_flag=False,  # the model is whole when the engine gets it
        hf_ds_config=deepspeed_config(
            _STAGES[engine], rows_per_rank=rows_per_rank, precision=precision, max_grad_norm=max_grad_norm
        ),
    )
    # `cpu=True` would silently switch DeepSpeed off and fall back to DDP.
    backend = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=waiting)
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[backend], **said)
    overrule_launcher(engine, precision)  # what accelerate itself has just written there
    return accelerator


def build_engine(
    engine: EngineName,
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    *,
    precision: Precision,
    max_grad_norm: float | None,
) -> Engine:
    """Hand model and optimizer to the engine; from here on they are used through it."""
    if engine == "ddp":
        return ReplicatedEngine(accelerator, module, optimizer, precision, max_grad_norm)
    from vlm.training.engines.zero import ZeroEngine

    return ZeroEngine(accelerator, module, optimizer, precision, _STAGES[engine])


def _use_deepspeed_on_cpu() -> None:
    """Tell DeepSpeed that there is no accelerator, and keep it from compiling what training never calls."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # Its all-reduce in shared memory serves inference alone, and building it takes a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _stand_alone_rendezvous() -> None:
    """DeepSpeed wants a process group even for one process; give it one when no launcher has."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
