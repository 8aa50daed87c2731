"""The start of the engine that a recipe names: its ranks are joined, then it takes the model."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from torch import nn

from vlm.errors import EveryRankError
from vlm.training.engines.base import Engine, EngineSettings
from vlm.training.engines.options import TAKES
from vlm.training.engines.registry import ENGINES
from vlm.training.launcher_settings import overrule_launcher
from vlm.training.optimizers.maker import OptimizerMaker

_LEAST_MEETING, _MOST_MEETING = 60.0, 600.0  # seconds


def start_accelerator(
    settings: EngineSettings, *, trackers: tuple[str, ...] = (), run: Path | None = None, patience: float = 1800.0
) -> Accelerator:
    """Join the other ranks (gloo on CPU, NCCL on GPU) under accelerate, with DeepSpeed where the engine asks for it.

    Every setting is said here: what a launcher or its configuration file says otherwise changes nothing. Precision is
    the engine's own autocast, and micro-batches are the trainer's. The other ranks are waited for as long as `patience`
    says, but for a minute at least: they start at different times.
    """
    require_options(settings)
    overrule_launcher(settings.name, settings.precision)
    waiting = timedelta(seconds=min(max(patience, _LEAST_MEETING), _MOST_MEETING))
    project = ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "tensorboard")) if run else None
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    accelerator = Accelerator(
        log_with=list(trackers) or None,
        project_config=project,
        **ENGINES.find(settings.name).start_options(settings, waiting, cuda=cuda),
    )
    overrule_launcher(settings.name, settings.precision)  # what accelerate itself has just written there
    return accelerator


def configuration(settings: EngineSettings, *, cuda: bool) -> dict[str, Any]:
    """What a run of these settings tells accelerate and what it drives, in plain values; nothing is started.

    `engine` says what the engine does by itself, whatever its libraries are told: precision by autocast around the
    towers, clipping, and the rows of the fullest rank; micro-batches are the trainer's, within one step of accelerate
    and DeepSpeed. `accelerate` are options of its `Accelerator`, and `deepspeed` is the whole of DeepSpeed's
    configuration; under ddp it is `distributed_data_parallel`, under fsdp `fully_shard`. For a recipe:

        configuration(launch.parts.engine_settings(recipe, recipe.max_grad_norm, ranks=16), cuda=True)

    Raises UserError for options that the engine does not have.
    """
    require_options(settings)
    own = {
        "name": settings.name,
        "rows_per_rank": settings.rows_per_rank,
        "precision": settings.precision,
        "max_grad_norm": settings.max_grad_norm,
        "options": settings.options.model_dump(mode="json"),
    }
    return {"engine": own, **ENGINES.find(settings.name).configuration(settings, cuda=cuda)}


def require_options(settings: EngineSettings) -> None:
    """Raise EveryRankError for an option that the engine does not have, naming those that do."""
    for key, found in settings.options.chosen().items():
        if key in ENGINES.find(settings.name).takes:
            continue
        able = [name for name, takes in TAKES.items() if key in takes]
        raise EveryRankError(
            f"engine_options.{key}: found {found!r}, which engine {settings.name} does not have; "
            f"it is for engine: {', '.join(able)}"
        )


def build_engine(
    settings: EngineSettings, accelerator: Accelerator, module: nn.Module, make_optimizer: OptimizerMaker
) -> Engine:
    """Hand a model to the engine; from here on it is used through it. Collective.

    Raises EveryRankError for an optimizer that would not be right under this engine.
    """
    engine = ENGINES.find(settings.name)
    words = make_optimizer.config.unfit_for(settings.name, engine.layout, settings.options)
    if words is not None:
        raise EveryRankError(words)
    return engine.build(accelerator, module, make_optimizer, settings)
