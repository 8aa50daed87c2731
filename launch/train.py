"""Train a recipe: start or resume a run, evaluate it, write its report."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from data.loading.sequential import SequentialStream
from data.loading.stream import TrainStream
from data.shards.cache import ShardCache
from eval.evaluator import EvaluationContext
from eval.progress import on_progress
from eval.recipe import build_evaluators
from eval.report import write_report
from launch.agreement import require_same_start, require_same_view
from launch.ending import how_to_go_on, lost_words
from launch.facts import package_versions, run_facts
from launch.limits import require_batches_fit, require_enough_samples, require_towers_fit
from launch.recipe import Recipe, resolve_order
from launch.resume import Start, find_start, model_to_train, require_same_data
from launch.start_lines import data_line, model_line, place_lines
from launch.trackers import require_trackers, start_trackers
from vlm.batch import Skip
from vlm.checkpoint.data_record import DataRecord
from vlm.checkpoint.manifest import Manifest
from vlm.distributed.world import World
from vlm.ends.ranks import Patience
from vlm.ends.stops import Stops
from vlm.ends.watch import Watch
from vlm.errors import UserError
from vlm.model.dual_encoder import DualEncoder, no_weight_decay_names
from vlm.objectives.objective import Objective
from vlm.objectives.state import RunFacts
from vlm.outputs import module_key
from vlm.paths import output_folder
from vlm.similarity.exchange import Exchange
from vlm.training.engines.base import EngineSettings
from vlm.training.engines.start import build_engine
from vlm.training.launcher_settings import overrule_launcher
from vlm.training.ledger import judge_bad, reasons_of
from vlm.training.optimizer import optimizer_maker
from vlm.training.progress import make_progress, show_lines
from vlm.training.rehearsal import rehearse
from vlm.training.roles import ScheduledEvaluation
from vlm.training.run_directory import RunDirectory
from vlm.training.state import restore_memory, restore_state
from vlm.training.together import ranks_together
from vlm.training.trainer import Trainer

REPORT = "report.html"
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class _Parts:
    """The parts that a recipe names, built and checked before anything is written."""

    model: DualEncoder
    source: TrainStream | SequentialStream
    evaluations: list[ScheduledEvaluation]
    records: dict[str, DataRecord]


def train(recipe: Recipe, *, resume: str | None = None, allow_changes: bool = False) -> Path:
    """Run the recipe to its end and return the run directory. Collective under a launcher.

    `resume` is None for a new run, "auto" for the newest complete checkpoint (or a new run where there is none), or a
    checkpoint's folder. Raises UserError for what the user can mend; nothing is written before everything was checked.
    """
    output_folder(recipe.run, "run")
    require_trackers(recipe.trackers)
    require_towers_fit(recipe.model)
    recipe = resolve_order(recipe)
    overruled = overrule_launcher(recipe.engine, recipe.precision)
    together = ranks_together(
        engine_settings(recipe, recipe.max_grad_norm),
        trackers=recipe.trackers,
        run=Path(recipe.run),
        patience=Patience(recipe.data.patience),
    )
    with together as (accelerator, watch):
        world = World.current(accelerator.device)
        require_same_start(world, recipe, {"--resume": resume, "--allow-changes": allow_changes})
        show_lines(world.is_main, place_lines(recipe, world, overruled))
        run = RunDirectory(Path(recipe.run), world)
        try:
            start = find_start(run, recipe, resume, allow_changes=allow_changes)
            parts = _build_parts(recipe, world, model_to_train(recipe, run, start.checkpoint))
            require_same_view(world, parts.records)
            if start.checkpoint is not None:
                require_same_data(start, parts.source)
                _reuse_threads(start.checkpoint.manifest, recipe, world)
            _rehearse(recipe, parts)
            trainer = _build_trainer(recipe, accelerator, parts, run)
            _run(trainer, accelerator, parts, start, watch)
        finally:
            run.release()
    return run.path


def _build_parts(recipe: Recipe, world: World, model: DualEncoder) -> _Parts:
    show_lines(world.is_main, [model_line(recipe, model)])
    require_batches_fit(recipe, rows_per_rank(recipe.global_batch), model.image_spec.size, model.embed_dim)
    source = open_stream(recipe, model, world)
    require_enough_samples(recipe.global_batch, source.num_samples)
    cache = ShardCache(recipe.data.cache, recipe.data.retry)
    context = EvaluationContext(model.image_spec, model.tokenizer, recipe.data.root, cache)
    evaluators = build_evaluators(recipe.evaluate, context)
    evaluations = []
    for name, evaluator in evaluators.items():
        every = recipe.evaluate[name].every
        steps = None if every is None else max(1, every.steps(recipe.global_batch, source.num_samples))
        evaluations.append(ScheduledEvaluation(name, evaluator, steps))
    records = {f"data.sources.{summary.name}": summary.record for summary in source.sources}
    for name, evaluator in evaluators.items():
        records |= {f"evaluate.{name}.{key}": record for key, record in evaluator.records.items()}
    return _Parts(model, source, evaluations, records)


def open_stream(
    recipe: Recipe, model: DualEncoder, world: World, *, record: bool = True
) -> TrainStream | SequentialStream:
    """The training data of a recipe as a model reads it; without `record`, nothing is written below the run."""
    if recipe.data.mode == "sequential":
        return SequentialStream(
            recipe.data,
            model.image_spec,
            model.tokenizer,
            global_batch=recipe.global_batch,
            seed=recipe.seed,
            world=world,
        )
    return TrainStream(
        recipe.data,
        model.image_spec,
        model.tokenizer,
        global_batch=recipe.global_batch,
        seed=recipe.seed,
        world=world,
        record=Path(recipe.run) if record else None,
    )


def build_objective(recipe: Recipe, model: DualEncoder, num_samples: int, world: World) -> Objective:
    """The recipe's objective; what its terms learn is put into the model. Collective."""
    num_steps = recipe.duration.steps(recipe.global_batch, num_samples)
    facts = RunFacts(
        dim=model.embed_dim,
        num_samples=num_samples,
        num_steps=num_steps,
        steps_per_epoch=max(1, round(num_samples / recipe.global_batch)),
        seed=recipe.seed,
        world=world,
    )
    objective = Objective(recipe.objective, recipe.providers, Exchange(world, recipe.similarity), facts)
    for name, value in objective.parameters().items():
        model.term_parameters[module_key(name)] = torch.nn.Parameter(value.float())
    return objective


def _rehearse(recipe: Recipe, parts: _Parts) -> None:
    rehearse(
        parts.model,
        recipe.objective,
        recipe.providers,
        recipe.similarity,
        num_pairs=recipe.global_batch,
        labels=parts.source.labelled,
        captions=any(recipe.data.caption_of(name).policy == "all" for name in recipe.data.sources),
    )


def _build_trainer(recipe: Recipe, accelerator: Accelerator, parts: _Parts, run: RunDirectory) -> Trainer:
    world = World.current(accelerator.device)
    objective = build_objective(recipe, parts.model, parts.source.num_samples, world)
    make_optimizer = optimizer_maker(recipe.optimizer, no_weight_decay_names(parts.model))
    settings = engine_settings(recipe, recipe.max_grad_norm)
    engine = build_engine(settings, accelerator, parts.model, make_optimizer)
    manifest = Manifest(
        step=0,
        samples=0,
        num_updates=0,
        world_size=engine.world.size,
        engine=recipe.engine,
        threads=torch.get_num_threads(),
        model=parts.model.config.model_dump(mode="json"),
        data={source.name: source.record for source in parts.source.sources},
        versions=package_versions(),
    )
    return Trainer(recipe, engine, objective, parts.source, parts.evaluations, run, manifest)


def _run(trainer: Trainer, accelerator: Accelerator, parts: _Parts, start: Start, watch: Watch) -> None:
    engine, run, checkpoint = trainer.engine, trainer.run_directory, start.checkpoint
    if checkpoint is not None:
        restore_state(checkpoint, engine, trainer.ema, trainer.teacher)
        restore_memory(checkpoint, trainer.objective)
        parts.source.restore(checkpoint.manifest.stream)
        trainer.restore_counts(checkpoint.manifest)
    recipe = trainer.config
    metrics = {evaluation.name: evaluation.evaluator.metrics for evaluation in parts.evaluations}
    facts = run_facts(recipe.engine, recipe.precision, engine, parts.source, metrics)
    folder = None if checkpoint is None else checkpoint.folder
    told = run.start(recipe.model_dump(mode="json"), facts, start.step, folder)
    told += run.cut_back(start.step if start.step else -1)  # from the first step on, what the start found is told anew
    pending = () if checkpoint is None else checkpoint.manifest.pending
    run.forget_evaluations(start.step, pending)
    watch.teller.record_in(run.path)
    watch.lost_now = lambda: lost_words(run.checkpoint_steps())
    trainer.trackers = start_trackers(
        accelerator, recipe.trackers, run.path, recipe.model_dump(mode="json"), start.step
    )
    steps_per_epoch = parts.source.num_samples / recipe.global_batch
    place = data_line(parts.source, recipe.global_batch, trainer.num_steps, start.step)
    show_lines(engine.world.is_main, [place])
    progress = make_progress(engine.world.is_main, start.step, trainer.num_steps, steps_per_epoch)
    try:
        evaluators = [evaluation.evaluator for evaluation in parts.evaluations]
        notices = [line for evaluator in evaluators for line in evaluator.notices] if engine.world.is_main else []
        notices += parts.model.notices if engine.world.is_main else ()
        for line in (*start.notices, *told, *parts.source.notices, *notices, *_told(parts.source.problems)):
            progress.say(line)
        is_told = engine.world.is_main and start.step == 0
        run.log_skips([(0, problem) for problem in parts.source.problems] if is_told else [])
        judge_bad(reasons_of(parts.source.problems), parts.source.num_samples, parts.source.max_bad_share)
        with on_progress(lambda work, done, total: progress.note(f"evaluating: {work} {done:,}/{total:,}")):
            progress.say("training begins: the first batch is being loaded")
            stops = Stops(watch, engine.world, how_to_go_on())
            with watch.keeping_requests():
                trainer.run(start.step, progress, stops, pending)
    finally:
        progress.close()
    if engine.world.is_main:
        write_report([run.path], run.path / REPORT)
    engine.world.barrier()


def _told(problems: Sequence[Skip]) -> list[str]:
    """Lines on what was unusable at the start; the ledger names all of it."""
    lines = [f"skipped: {problem.shard} {problem.key}: {problem.reason}" for problem in problems[:_SHOWN_PROBLEMS]]
    more = len(problems) - len(lines)
    return [*lines, f"skipped: {more:,} more, named in ledger.jsonl"] if more else lines


def rows_per_rank(global_batch: int) -> int:
    """The rows of the fullest of the launched ranks. Raises UserError when some rank would have none."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if global_batch < ranks:
        raise UserError(f"global_batch: {global_batch} pairs leave some of {ranks} ranks without any")
    return math.ceil(global_batch / ranks)


def engine_settings(recipe: Recipe, max_grad_norm: float | None) -> EngineSettings:
    """The engine's settings by a recipe and the launched ranks, but for the limit on the gradient's norm."""
    return EngineSettings(recipe.engine, rows_per_rank(recipe.global_batch), recipe.precision, max_grad_norm)


def _reuse_threads(manifest: Manifest, recipe: Recipe, world: World) -> None:
    """The order of sums on a CPU depends on the number of threads: a resumed run takes that of its checkpoint."""
    if (manifest.engine, manifest.world_size) == (recipe.engine, world.size):
        torch.set_num_threads(manifest.threads)
