"""`vlm verify-gradients`: one step of a recipe, as the launch at hand takes it, beside the single-process reference."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from launch.recipe import Recipe, resolve_order
from launch.train import build_objective, open_stream, rows_per_rank
from vlm.batch import Batch
from vlm.errors import UserError
from vlm.model.build import build_model
from vlm.model.dual_encoder import DualEncoder, no_weight_decay_names
from vlm.objectives.objective import Objective
from vlm.training.accumulation import MicroBatches, accumulate
from vlm.training.build_engine import build_engine, start_accelerator
from vlm.training.checkpoint import Checkpoint
from vlm.training.engine import Engine, Precision
from vlm.training.optimizer import build_optimizer
from vlm.training.state import restore_memory
from vlm.training.teacher import Teacher
from vlm.training.verification import GroupComparison, compare_gradients, reference_gradients
from vlm.world import World


def verify(recipe: Recipe, checkpoint: Path | None = None) -> bool:
    """Whether the gradient of one real batch agrees with the reference in every group of parameters. Collective.

    The reference is one graph over the whole global batch on rank 0, in fp32, without sharding: take a recipe (or an
    override of `global_batch`) whose batch fits there. Prints a table on rank 0; writes nothing.
    """
    if recipe.similarity.group_ranks is not None:
        raise UserError("similarity.group_ranks: the reference is of one process, which has no groups; leave it out")
    recipe = resolve_order(recipe)
    accelerator = start_accelerator(
        recipe.engine,
        rows_per_rank=rows_per_rank(recipe.global_batch),
        precision=recipe.precision,
        max_grad_norm=None,
    )
    try:
        world = World.current(accelerator.device)
        saved = None if checkpoint is None else Checkpoint(checkpoint)
        model, objective, batch = _prepare(recipe, world, saved)
        batches = world.gather_objects(batch)
        expected = _reference(recipe, objective.facts.num_samples, batches, saved) if world.is_main else None
        world.barrier()
        optimizer = build_optimizer(model, recipe.optimizer, no_weight_decay_names(model))
        engine = build_engine(
            recipe.engine, accelerator, model, optimizer, precision=recipe.precision, max_grad_norm=None
        )
        compared = _compare(recipe, engine, objective, batch, expected)
    finally:
        accelerator.end_training()
    if world.is_main:
        _show(compared, recipe, world)
    return all(group.is_right(_precision(recipe)) for group in compared)


def _prepare(recipe: Recipe, world: World, saved: Checkpoint | None) -> tuple[DualEncoder, Objective, Batch]:
    model = build_model(recipe.model, recipe.seed)
    source = open_stream(recipe, model, world, record=False)
    objective = build_objective(recipe, model, source.num_samples, world)
    _restore(model, objective, saved)
    step = 0 if saved is None else saved.manifest.step
    if saved is not None:
        source.restore(saved.manifest.stream)
    return model, objective, next(iter(source.batches(step, 1)))


def _reference(
    recipe: Recipe, num_samples: int, batches: list[Batch], saved: Checkpoint | None
) -> dict[str, torch.Tensor]:
    alone = World(device=batches[0].images.device)
    model = build_model(recipe.model, recipe.seed)
    plain = recipe.model_copy(update={"similarity": type(recipe.similarity)()})
    objective = build_objective(plain, model, num_samples, alone)
    _restore(model, objective, saved)
    return reference_gradients(model.to(alone.device).train(), objective, batches, recipe.micro_batch, recipe.seed)


@torch.no_grad()
def _restore(model: DualEncoder, objective: Objective, saved: Checkpoint | None) -> None:
    if saved is not None:
        model.load_state_dict(saved.tensors("weights"))
        restore_memory(saved, objective)


def _compare(
    recipe: Recipe, engine: Engine, objective: Objective, batch: Batch, expected: dict[str, torch.Tensor] | None
) -> list[GroupComparison]:
    engine.module.train()
    here = batch.to(engine.world.device)
    engine.warm_up(here)
    teacher = Teacher(recipe.teacher, engine) if objective.needs_teacher else None
    cuts = MicroBatches(recipe.global_batch, engine.world.size, recipe.micro_batch)
    accumulate(engine, objective, here, cuts, recipe.seed, teacher)
    compared = compare_gradients(engine.parameters(), engine.gradient, expected)
    shared: list[list[GroupComparison]] = engine.world.gather_objects(compared)
    return shared[0]


def _precision(recipe: Recipe) -> Precision:
    low = "bf16" in (recipe.precision, recipe.similarity.product, recipe.similarity.wire)
    return "bf16" if low else "fp32"


def _show(compared: list[GroupComparison], recipe: Recipe, world: World) -> None:
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
    table = Table(title=f"gradient of {recipe.global_batch} pairs: {recipe.engine} on {ranks}, {recipe.precision}")
    for column in ("parameters", "values", "cosine", "norm ratio", ""):
        table.add_column(column, justify="left" if column in ("parameters", "") else "right")
    for group in compared:
        right = group.is_right(_precision(recipe))
        table.add_row(
            group.group,
            f"{group.num_values:,}",
            f"{group.cosine:.6f}",
            f"{group.norm_ratio:.6f}",
            "right" if right else "OFF",
        )
    Console().print(table)
