"""The start of the engine that a recipe names: its ranks are joined, then it takes the model."""

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from torch import nn

from vlm.training.engines.base import Engine, EngineSettings
from vlm.training.engines.registry import ENGINES
from vlm.training.launcher_settings import overrule_launcher
from vlm.training.optimizers import OptimizerMaker

_LEAST_MEETING, _MOST_MEETING = 60.0, 600.0  # seconds


def start_accelerator(
    settings: EngineSettings, *, trackers: tuple[str, ...] = (), run: Path | None = None, patience: float = 1800.0
) -> Accelerator:
    """Join the other ranks (gloo on CPU, NCCL on GPU) under accelerate, with DeepSpeed where the engine asks for it.

    Every setting is said here: what a launcher or its configuration file says otherwise changes nothing. Precision is
    the engine's own autocast, and micro-batches are the trainer's. The other ranks are waited for as long as `patience`
    says, but for a minute at least: they start at different times.
    """
    overrule_launcher(settings.name, settings.precision)
    waiting = timedelta(seconds=min(max(patience, _LEAST_MEETING), _MOST_MEETING))
    project = ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "tensorboard")) if run else None
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=1,
        dynamo_backend="no",
        log_with=list(trackers) or None,
        project_config=project,
        **ENGINES.find(settings.name).start_options(settings, waiting, cuda=cuda),
    )
    overrule_launcher(settings.name, settings.precision)  # what accelerate itself has just written there
    return accelerator


def build_engine(
    settings: EngineSettings, accelerator: Accelerator, module: nn.Module, make_optimizer: OptimizerMaker
) -> Engine:
    """Hand a model to the engine; from here on it is used through it. Collective."""
    return ENGINES.find(settings.name).build(accelerator, module, make_optimizer, settings)
