"""The parts that a recipe names: model, data and evaluations, built and checked before anything is written."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.loading.sequential import SequentialStream
from data.loading.stream import TrainStream
from data.shards.cache import ShardCache
from data.source_names import recipe_key
from eval.evaluator import EvaluationContext
from eval.recipe import build_evaluators
from launch.limits import require_batches_fit, require_enough_samples
from launch.recipe import Recipe
from launch.start_lines import model_line
from vlm.checkpoint.data_record import DataRecord
from vlm.distributed.world import World
from vlm.errors import EveryRankError, UserError
from vlm.model.dual_encoder import DualEncoder
from vlm.training.assembly import stage_images
from vlm.training.engines.base import EngineSettings
from vlm.training.hooks.evaluations import ScheduledEvaluation
from vlm.training.progress import show_lines


@dataclass(frozen=True)
class RunParts:
    """Model, data and evaluations of a run, with the records by which the sets of data are told from others."""

    model: DualEncoder
    source: TrainStream | SequentialStream
    evaluations: list[ScheduledEvaluation]
    records: dict[str, DataRecord]


def build_parts(recipe: Recipe, world: World, model: DualEncoder) -> RunParts:
    """The parts of a run of `model`. Raises UserError for what is wrong with the data. Collective."""
    show_lines(world.is_main, [model_line(recipe, model)])
    require_batches_fit(recipe, rows_per_rank(recipe.global_batch), model.image_spec.size, model.embed_dim)
    source = open_stream(recipe, model, world)
    require_enough_samples(recipe.global_batch, source.num_samples)
    cache = ShardCache(recipe.data.cache, recipe.data.retry)
    context = EvaluationContext(model.image_spec, model.tokenizer, recipe.data.root, cache)
    evaluators = build_evaluators(recipe.evaluate, context)
    for evaluator in evaluators.values():
        evaluator.require(model)
    evaluations = []
    for name, evaluator in evaluators.items():
        every = recipe.evaluate[name].every
        steps = None if every is None else max(1, every.steps(recipe.global_batch, source.num_samples))
        evaluations.append(ScheduledEvaluation(name, evaluator, steps))
    records = {recipe_key(summary.name): summary.record for summary in source.sources}
    for name, evaluator in evaluators.items():
        records |= {f"evaluate.{name}.{key}": record for key, record in evaluator.records.items()}
    return RunParts(model, source, evaluations, records)


def open_stream(
    recipe: Recipe, model: DualEncoder, world: World, *, record: bool = True
) -> TrainStream | SequentialStream:
    """The training data of a recipe as a model reads it, which is made ready for the recipe's stages of images.

    Without `record`, nothing is written below the run.
    """
    if recipe.image_schedule and not recipe.data.images:
        raise EveryRankError("image_schedule: no images are read (data.images: false)")
    reads: dict[str, Any] = {"global_batch": recipe.global_batch, "seed": recipe.seed, "world": world}
    stream: TrainStream | SequentialStream
    if recipe.data.mode == "sequential":
        stream = SequentialStream(recipe.data, model.image_spec, model.tokenizer, **reads)
    else:
        folder = Path(recipe.run) if record else None
        stream = TrainStream(recipe.data, model.image_spec, model.tokenizer, **reads, record=folder)
    stream.stages = stage_images(recipe, model, stream.num_samples)
    return stream


def rows_per_rank(global_batch: int, ranks: int | None = None) -> int:
    """The rows of the fullest of so many ranks; None: the launched ones. Raises UserError when some would have none."""
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks
    if global_batch < ranks:
        raise UserError(f"global_batch: {global_batch} pairs leave some of {ranks} ranks without any")
    return math.ceil(global_batch / ranks)


def engine_settings(recipe: Recipe, max_grad_norm: float | None, ranks: int | None = None) -> EngineSettings:
    """The engine's settings by a recipe and so many ranks (None: the launched ones), but for the gradient's limit."""
    rows = rows_per_rank(recipe.global_batch, ranks)
    return EngineSettings(recipe.engine, rows, recipe.decided_precision, max_grad_norm, recipe.engine_options)
