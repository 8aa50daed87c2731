"""The state of a run, assembled from its recipe's training keys: objective, engine with optimizer, and averages."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator

from vlm.attention_choice import MeasuredAttention
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.model.activations import checkpoint_activations
from vlm.model.attach import freeze_unreached
from vlm.model.attention import choose_attention
from vlm.model.attention_measurement import measure_attention
from vlm.model.compiled import compile_blocks
from vlm.model.dual_encoder import DualEncoder
from vlm.objectives.objective import Objective
from vlm.objectives.state import RunFacts
from vlm.outputs import module_key
from vlm.similarity.exchange import Exchange
from vlm.training.config import TrainingConfig
from vlm.training.ema import Ema
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.start import build_engine
from vlm.training.image_schedule import KEY, ImageStages, TrainedImages, resolved_stages
from vlm.training.optimizers.maker import optimizer_maker
from vlm.training.spikes import SpikeWatch
from vlm.training.step import TrainState
from vlm.training.teacher import Teacher


def assemble(
    config: TrainingConfig,
    settings: EngineSettings,
    accelerator: Accelerator,
    model: DualEncoder,
    objective: Objective,
    known_attention: Iterable[MeasuredAttention] = (),
) -> TrainState:
    """The state with which a run begins, from the model and the objective built for it. Collective.

    The model is used through the engine from here on. `known_attention` is what a checkpoint says of its attention.
    """
    if model.decoder is not None:
        freeze_unreached(model, objective.needs.outputs)
    make_optimizer = optimizer_maker(config.optimizer, model)
    choose_attention(model, config.attention)
    measured: tuple[MeasuredAttention, ...] = ()
    if config.attention == "auto":
        dtype = torch.bfloat16 if config.decided_precision == "bf16" else model.logit_scale.dtype
        measured = measure_attention(model, dtype, World.current(accelerator.device), known_attention)
    model.text.groups_texts = config.group_texts
    compile_blocks(model, config.compile)
    checkpoint_activations(model, config.activation_checkpointing)
    engine = build_engine(settings, accelerator, model, make_optimizer)
    ema = Ema(config.ema, engine) if config.ema else None
    teacher = Teacher(config.teacher, engine) if objective.needs.teacher_outputs else None
    return TrainState(engine, objective, ema, teacher, SpikeWatch(config.guard) if config.guard else None, measured)


def stage_images(config: TrainingConfig, model: DualEncoder, num_samples: int) -> ImageStages:
    """The images that each step of a run trains on, an epoch having `num_samples`; the model is made ready for them.

    Raises EveryRankError for stages that do not fit the run, or that the image tower cannot follow.
    """
    own = TrainedImages(model.image.patch_dropout)
    stages = resolved_stages(
        config.image_schedule,
        own,
        global_batch=config.global_batch,
        num_samples=num_samples,
        num_steps=config.duration.steps(config.global_batch, num_samples),
    )
    shares = [stage.patch_dropout or 0.0 for stage in stages.images]
    if config.image_schedule and (own.patch_dropout or any(shares)):
        try:
            model.image.allow_patch_dropout()
        except ValueError as error:
            number = next((number for number, share in enumerate(shares) if share), 0)
            raise EveryRankError(f"{KEY}.{number}.patch_dropout: {error}") from None
    return stages


def build_objective(config: TrainingConfig, model: DualEncoder, num_samples: int, world: World) -> Objective:
    """The objective of a run; an epoch has `num_samples`. What terms learn is put into the model. Collective."""
    facts = RunFacts(
        dim=model.embed_dim,
        num_samples=num_samples,
        num_steps=config.duration.steps(config.global_batch, num_samples),
        steps_per_epoch=max(1, round(num_samples / config.global_batch)),
        seed=config.seed,
        world=world,
    )
    objective = Objective(config.objective, config.providers, Exchange(world, config.comparison), facts)
    for name, value in objective.parameters().items():
        model.term_parameters[module_key(name)] = torch.nn.Parameter(value.float())
    return objective
