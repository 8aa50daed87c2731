"""The lines of a run before its first step: where it runs, on what, with which model, over which data."""

import socket
from collections import Counter
from itertools import pairwise
from typing import Literal

import torch

from data.loading.sequential import SequentialStream
from data.loading.stream import TrainStream
from data.source_names import is_of_documents
from launch.recipe import Recipe
from vlm.distributed.world import World
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder
from vlm.model.lock import AllBut
from vlm.training.image_schedule import ImageStages, TrainedImages
from vlm.training.precision import slow_precision


def place_lines(recipe: Recipe, world: World, launcher: list[str]) -> list[str]:
    """The run directory, ranks and devices, engine and precision; what a launcher said otherwise. Collective."""
    machine_facts = world.gather_objects((socket.gethostname(), _device_name(world.device), torch.get_num_threads()))
    machines = len({host for host, _, _ in machine_facts})
    devices = ", ".join(f"{count} x {name}" for name, count in Counter(name for _, name, _ in machine_facts).items())
    threads = sorted({count for _, _, count in machine_facts})
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''} on {machines} machine{'s' if machines > 1 else ''}"
    slow = slow_precision(recipe.decided_precision)
    numbers = "-".join(str(count) for count in dict.fromkeys((threads[0], threads[-1])))
    return [
        f"run {recipe.run}: {ranks} ({devices}, {numbers} thread{'' if threads[-1] == 1 else 's'} each), "
        f"engine {recipe.engine}{_options(recipe)}, precision {recipe.precision}",
        *launcher,
        *([] if slow is None else [f"{slow}; precision: auto would choose fp32"]),
    ]


def _options(recipe: Recipe) -> str:
    """The options of the engine that the recipe chose."""
    chosen = [f"{key} {value}" for key, value in recipe.engine_options.chosen().items()]
    return f" ({', '.join(chosen)})" if chosen else ""


def model_line(recipe: Recipe, model: DualEncoder) -> str:
    """The model, its parameters and those of them that train, and the parts that are computed again."""
    every = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    training = "all trained" if trained == every else f"{trained:,} trained"
    size = model.image_spec.size
    weights = f", weights of {recipe.model.pretrained}" if recipe.model.pretrained else ""
    parts = " and ".join(dict.fromkeys(recipe.activation_checkpointing))
    again = f", blocks of {parts} computed again in the backward" if parts else ""
    locked = "".join(f", {name} tower locked{_but(lock)}" for name, lock in recipe.model.lock if lock is not None)
    name = _model_name(recipe.model)
    return f"model {name}: {every:,} parameters, {training}{weights}{locked}{again}; images {size} x {size}"


def _but(lock: Literal["all"] | AllBut) -> str:
    return "" if lock == "all" else f" but for {lock.all_but} block{'s' if lock.all_but > 1 else ''}"


def data_line(source: TrainStream | SequentialStream, batch: int, num_steps: int, start_step: int) -> str:
    """Samples, steps and epochs, and where training begins."""
    documents = [summary for summary in source.sources if is_of_documents(summary.name)]
    shards = sum(summary.num_shards for summary in source.sources if summary not in documents)
    epochs = num_steps * batch / source.num_samples
    num_documents = sum(summary.num_samples for summary in documents)
    beside = f"; beside them {num_documents:,} documents" if documents else ""
    near = [f"{one.name} in batches by {one.neighbours.split()[0]}" for one in source.sources if one.neighbours]
    begins = f"goes on from step {start_step:,}" if start_step else "begins at step 0"
    return (
        f"data {source.num_samples:,} samples in {shards:,} shard{'' if shards == 1 else 's'}: {batch:,} a step, "
        f"{num_steps:,} steps, {epochs:.4g} epochs; {'; '.join([begins, *near])}{beside}"
    )


def image_lines(stages: ImageStages, num_steps: int) -> list[str]:
    """The stages of images, where a recipe has any."""
    if not stages.ends:
        return []
    bounds = [0, *stages.ends, num_steps]
    words = [
        f"steps {start + 1:,} to {stop:,} {_images(stages.at(start))}"
        for start, stop in pairwise(bounds)
        if stop > start
    ]
    return [f"images in stages: {'; '.join(words)}"]


def _images(images: TrainedImages) -> str:
    return f"without {images.patch_dropout:.4g} of their patches" if images.patch_dropout else "whole"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _model_name(config: ModelConfig) -> str:
    if config.open_clip is not None:
        return config.open_clip
    if config.architecture is not None:
        vision, text = config.architecture.vision_cfg, config.architecture.text_cfg
        return f"{vision.get('timm_model_name', 'ViT')} + {text.get('hf_model_name', 'transformer')}"
    if config.transformers is not None:
        return config.transformers
    assert config.towers is not None
    return f"{config.towers.image.title} + {config.towers.text.title}"
