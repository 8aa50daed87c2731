"""Choose and start the engine that a recipe names."""

import os
import socket
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration
from torch import nn

from vlm.training.engine import Engine, EngineName, Precision, ReplicatedEngine

_STAGES: dict[EngineName, Literal[1, 2, 3]] = {"zero1": 1, "zero2": 2, "zero3": 3}


def start_accelerator(
    engine: EngineName,
    *,
    rows_per_rank: int,
    precision: Precision,
    max_grad_norm: float | None,
    trackers: tuple[str, ...] = (),
    run: Path | None = None,
) -> Accelerator:
    """Join the other ranks (gloo on CPU, NCCL on GPU) under accelerate, with DeepSpeed where the engine asks for it."""
    project = ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "tensorboard")) if run else None
    cuda = torch.cuda.is_available()
    if engine == "ddp":
        return Accelerator(cpu=not cuda, log_with=list(trackers) or None, project_config=project)
    if not cuda:
        _use_deepspeed_on_cpu()
    from vlm.training.zero import deepspeed_config

    _stand_alone_rendezvous()
    plugin = DeepSpeedPlugin(
        zero3_init_flag=False,  # the model is whole when the engine gets it
        hf_ds_config=deepspeed_config(
            _STAGES[engine], rows_per_rank=rows_per_rank, precision=precision, max_grad_norm=max_grad_norm
        ),
    )
    # `cpu=True` would silently switch DeepSpeed off and fall back to DDP.
    backend = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")
    return Accelerator(
        deepspeed_plugin=plugin, kwargs_handlers=[backend], log_with=list(trackers) or None, project_config=project
    )


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
    from vlm.training.zero import ZeroEngine

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
