"""The checkpoints that a recipe keeps, compared with what its run measures."""

import math

from launch.parts import RunParts
from launch.recipe import Recipe
from vlm.checkpoint.retention import Best, KeepConfig, Retention
from vlm.errors import EveryRankError, nearest

_KEY = "keep_checkpoints.best"


def retention_of(recipe: Recipe, parts: RunParts, num_steps: int) -> Retention | None:
    """What a run of so many steps keeps; None: all of it.

    Raises:
        EveryRankError: a figure is not measured, or never where a checkpoint is saved, or neither way is better.
    """
    keep, num_samples = recipe.keep_checkpoints, parts.source.num_samples
    if keep is None:
        return None
    keep = KeepConfig(last=keep) if isinstance(keep, int) else keep
    regular = max(1, recipe.checkpoint_every.steps(recipe.global_batch, num_samples))
    every = None if keep.every is None else max(1, keep.every.steps(recipe.global_batch, num_samples))
    best = tuple(_best(metric, count, parts, regular, num_steps) for metric, count in keep.best.items())
    return Retention(keep.last, regular, every, best)


def _best(name: str, count: int, parts: RunParts, regular: int, num_steps: int) -> Best:
    metrics = {
        f"eval/{one.name}/{metric.name}": (one, metric) for one in parts.evaluations for metric in one.evaluator.metrics
    }
    if name not in metrics:
        raise EveryRankError(f"{_KEY}: nothing in this run measures {name}; {nearest(name, metrics)}")
    evaluation, metric = metrics[name]
    if metric.better is None:
        ways = [one for one, (_, other) in metrics.items() if other.better is not None]
        raise EveryRankError(f"{_KEY}: of {name} neither way is better; {nearest(name, ways)}")
    every = evaluation.every_steps
    if every is None or math.lcm(every, regular) >= num_steps:
        measured = (
            "at the end alone" if every is None else f"every {every} steps, checkpoints are saved every {regular}"
        )
        raise EveryRankError(
            f"{_KEY}: {name} is measured {measured}: before the end no checkpoint has it; set "
            f"evaluate.{evaluation.name}.every to checkpoint_every or a multiple of it"
        )
    return Best(name, count, metric.better == "higher")
