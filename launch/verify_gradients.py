"""`vlm verify-gradients`: one step of a recipe, as the launch at hand takes it, beside the single-process reference."""

from pathlib import Path

import torch
from rich.table import Table

from launch.parts import engine_settings, open_stream
from launch.recipe import Recipe, settled
from vlm.batch import Batch
from vlm.checkpoint.format import Checkpoint, first_differences
from vlm.distributed.world import World
from vlm.ends.ranks import Patience
from vlm.errors import EveryRankError, UserError
from vlm.model.build import build_model
from vlm.model.dual_encoder import DualEncoder
from vlm.objectives.objective import Objective
from vlm.similarity.config import SimilarityConfig
from vlm.terminal import Terminal
from vlm.training.accumulation import accumulate, remember
from vlm.training.assembly import assemble, build_objective, stage_images
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.precision import Precision
from vlm.training.state import restore_memory
from vlm.training.step import TrainState
from vlm.training.together import ranks_together
from vlm.training.verification import GroupComparison, compare_gradients, reference_gradients

_REMEMBERED = 2  # batches that fill a new memory: a sample may come twice, a small queue runs over


def verify(recipe: Recipe, checkpoint: Path | None = None) -> bool:
    """Whether the gradient of one real batch agrees with the reference in every group of parameters. Collective.

    The reference is one graph over the whole global batch on rank 0, in fp32, without sharding: take a recipe (or an
    override of `global_batch`) whose batch fits there. Where the objective remembers (a queue, a table of samples) and
    no checkpoint brings its memory, that is filled by the batches before. Prints a table on rank 0; writes nothing.
    """
    if recipe.similarity.group_ranks is not None:
        raise UserError("similarity.group_ranks: the reference is of one process, which has no groups; leave it out")
    recipe = settled(recipe)
    settings = engine_settings(recipe, max_grad_norm=None)
    with ranks_together(settings, patience=Patience(recipe.data.patience)) as (accelerator, _):
        world = World.current(accelerator.device)
        saved = None if checkpoint is None else Checkpoint(checkpoint)
        model, objective, batches = _prepare(recipe, world, saved)
        steps = [world.gather_objects(batch) for batch in batches]
        expected = _reference(recipe, objective.facts.num_samples, steps, saved) if world.is_main else None
        world.barrier()
        state = assemble(recipe, settings, accelerator, model, objective)
        compared = _compare(recipe, state, batches, expected)
    if world.is_main:
        _show(compared, recipe, world, len(batches) - 1)
    return all(group.is_right(_precision(recipe)) for group in compared)


def _prepare(recipe: Recipe, world: World, saved: Checkpoint | None) -> tuple[DualEncoder, Objective, list[Batch]]:
    """Model, objective, and the batches of some steps: those that only fill the memory, then the one compared."""
    model = build_model(recipe.model, recipe.seed)
    source = open_stream(recipe, model, world, record=False)
    objective = build_objective(recipe, model, source.num_samples, world)
    _restore(model, objective, saved)
    step = 0 if saved is None else saved.manifest.step
    if saved is not None:
        source.restore(saved.manifest.stream)
    num_earlier = _REMEMBERED if objective.states and saved is None else 0
    return model, objective, list(source.batches(step, 1 + num_earlier))


def _reference(
    recipe: Recipe, num_samples: int, steps: list[list[Batch]], saved: Checkpoint | None
) -> dict[str, torch.Tensor]:
    alone = World(device=steps[0][0].sample_ids.device)
    model = build_model(recipe.model, recipe.seed)
    plain = recipe.model_copy(update={"similarity": SimilarityConfig(product="fp32")})
    objective = build_objective(plain, model, num_samples, alone)
    stage_images(plain, model, num_samples)
    _restore(model, objective, saved)
    return reference_gradients(model.to(alone.device).train(), objective, steps, recipe.micro_batch, recipe.seed)


@torch.no_grad()
def _restore(model: DualEncoder, objective: Objective, saved: Checkpoint | None) -> None:
    if saved is not None:
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if differences := first_differences(expected, saved.shapes("weights")):
            raise EveryRankError(f"checkpoint {saved.folder} is of another architecture: {differences}")
        model.load_state_dict(saved.tensors("weights"))
        restore_memory(saved, objective)


def _compare(
    recipe: Recipe, state: TrainState, batches: list[Batch], expected: dict[str, torch.Tensor] | None
) -> list[GroupComparison]:
    engine, objective, teacher = state.engine, state.objective, state.teacher
    engine.module.train()
    *earlier, last = (batch.to(engine.world.device) for batch in batches)
    engine.warm_up(last, objective.needs.outputs)
    plan = MicroBatchPlan(recipe.global_batch, engine.world.size, recipe.micro_batch)
    for batch in earlier:
        remember(engine, objective, batch, plan, recipe.seed, teacher)
    accumulate(engine, objective, last, plan, recipe.seed, teacher)
    compared = compare_gradients(engine.parameters(), engine.gradient, expected)
    shared: list[list[GroupComparison]] = engine.world.gather_objects(compared)
    return shared[0]


def _precision(recipe: Recipe) -> Precision:
    wires = (recipe.similarity.wire, recipe.engine_options.wire)
    return "bf16" if "bf16" in (recipe.decided_precision, recipe.comparison.product, *wires) else "fp32"


def _show(compared: list[GroupComparison], recipe: Recipe, world: World, num_earlier: int) -> None:
    ranks = f"{world.size} rank{'s' if world.size > 1 else ''}"
    memory = f", memory filled by {num_earlier} batches" if num_earlier else ""
    what = f"gradient of {recipe.global_batch} pairs: {recipe.engine} on {ranks}, {recipe.decided_precision}{memory}"
    table = Table(title=what)
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
    Terminal().print(table)
