"""The hooks of a recipe's run, in the order in which they see a step."""

import torch

from launch.facts import package_versions
from launch.parts import RunParts
from launch.recipe import Recipe
from launch.resume import Start
from launch.retention import retention_of
from vlm.checkpoint.manifest import Manifest
from vlm.duration import Duration
from vlm.geometry import names
from vlm.objectives.objective import Objective
from vlm.outputs import PAIR
from vlm.training.alarm import Alarms, require_known
from vlm.training.control import RunControl
from vlm.training.hooks import step_log
from vlm.training.hooks.base import Hook
from vlm.training.hooks.checkpoints import CheckpointPlan, Checkpoints
from vlm.training.hooks.compilation import CompilationTime
from vlm.training.hooks.evaluations import Evaluations
from vlm.training.hooks.geometry import GeometryTelemetry
from vlm.training.hooks.guard import Guard
from vlm.training.hooks.heap import HeapTrim
from vlm.training.hooks.ledger import Ledger
from vlm.training.hooks.profile import Profile
from vlm.training.hooks.sample_record import SampleRecord
from vlm.training.hooks.spikes import SpikeGuard
from vlm.training.hooks.step_log import StepLog
from vlm.training.recorder import Recorder
from vlm.training.step import TrainState


def require_known_alarms(recipe: Recipe, parts: RunParts, objective: Objective) -> None:
    """Raise EveryRankError for an alarm on a figure that none of the run's hooks writes."""
    figures = {"": [*step_log.FIGURES, *objective.terms]}
    for evaluation in parts.evaluations:
        kind = f"eval/{evaluation.name}"
        figures[kind] = [f"{kind}/{metric.name}" for metric in evaluation.evaluator.metrics]
    if _sees_pairs(recipe, objective):
        figures["geometry"] = [f"geometry/{name}" for name in names.FIGURES]
    require_known(recipe.alarm, figures)


def _sees_pairs(recipe: Recipe, objective: Objective) -> bool:
    """Whether the geometry of steps is measured: where both images and texts are embedded."""
    return recipe.geometry.every is not None and objective.pair_needs.outputs >= PAIR


def build_alarms(recipe: Recipe, parts: RunParts) -> Alarms:
    """The alarms of a recipe, their stretches in steps."""
    return Alarms(recipe.alarm, lambda stretch: stretch.steps(recipe.global_batch, parts.source.num_samples))


def build_hooks(
    recipe: Recipe, state: TrainState, parts: RunParts, start: Start, recorder: Recorder, control: RunControl
) -> list[Hook]:
    """All hooks of a run that begins or goes on at `start`."""
    world, source, first = state.engine.world, parts.source, _manifest(recipe, state, parts)
    manifest = first if start.checkpoint is None else start.checkpoint.manifest

    def steps(duration: Duration) -> int:
        return max(1, duration.steps(recipe.global_batch, source.num_samples))

    counts = manifest.counts if world.is_main else None
    documents = recipe.data.documents.per_step if recipe.data.documents else 0
    spikes = None
    if state.spikes is not None:
        spikes = SpikeGuard(state.spikes, state, recorder, steps(recipe.checkpoint_every), manifest.spikes)
    ledger = Ledger(recorder.run, source.max_bad_share, recipe.global_batch + documents, start.step, counts)
    guard = Guard(recorder, recipe.max_bad_steps, manifest.left_out, spikes)
    hooks: list[Hook] = [CompilationTime(recorder), ledger] if recipe.compile else [ledger]
    if recipe.record_samples:
        hooks.append(SampleRecord(recorder.run))
    if world.device.type == "cpu":
        hooks.append(HeapTrim())
    hooks += [guard, StepLog(recorder, world, control.clock, ledger, guard, steps(recipe.log_every))]
    if recipe.geometry.every is not None and _sees_pairs(recipe, state.objective):
        hooks.append(GeometryTelemetry(recorder, world, steps(recipe.geometry.every), recipe.geometry.sample))
    hooks.append(Evaluations(parts.evaluations, state, recorder, control, manifest.pending))
    background = recipe.checkpoint_in_background
    retention = retention_of(recipe, parts, control.num_steps)
    plan = CheckpointPlan(
        steps(recipe.checkpoint_every), retention, first, background=background, on_saved=recorder.run.saved
    )
    hooks.append(Checkpoints(state, source, tuple(hooks), recorder, control, plan))
    return hooks if recipe.profile is None else [*hooks, Profile(recorder, world, control.clock, recipe.profile)]


def _manifest(recipe: Recipe, state: TrainState, parts: RunParts) -> Manifest:
    """The manifest of the first step, much of which stays the same from checkpoint to checkpoint."""
    return Manifest(
        step=0,
        samples=0,
        num_updates=0,
        world_size=state.engine.world.size,
        engine=recipe.engine,
        threads=torch.get_num_threads(),
        attention=state.attention,
        model=parts.model.config.model_dump(mode="json"),
        data={source.name: source.record for source in parts.source.sources},
        versions=package_versions(),
    )
