"""Train a recipe: start or resume a run, evaluate it, write its report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from eval.recipe import check_files
from launch.agreement import require_same_start, require_same_view
from launch.ending import how_to_go_on, lost_words
from launch.facts import run_facts
from launch.hooks import build_alarms, build_hooks, require_known_alarms
from launch.limits import require_towers_fit
from launch.mirror import Mirror, fetch_run, leave_later, require_mirror
from launch.parts import RunParts, build_parts, engine_settings
from launch.recipe import Recipe, settled
from launch.resume import AUTO, Start, as_begun, find_start, model_to_train, require_same_data
from launch.retention import retention_of
from launch.shown_progress import shown_progress
from launch.start_lines import data_line, image_lines, place_lines
from launch.trackers import require_trackers, start_trackers
from vlm.activity import activity
from vlm.batch import COUNTERFACTUALS, DEGRADED, Skip
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import Manifest
from vlm.distributed.world import World
from vlm.ends.hang import HangWatch
from vlm.ends.ranks import Patience
from vlm.ends.stops import Stops
from vlm.ends.watch import Watch
from vlm.errors import EveryRankError, UserError
from vlm.objectives.objective import Objective
from vlm.outputs import captioned_parts
from vlm.paths import output_folder
from vlm.progress import on_progress
from vlm.training.assembly import assemble, build_objective
from vlm.training.clock import Clock
from vlm.training.control import RunControl
from vlm.training.engines.base import EngineSettings
from vlm.training.launcher_settings import overrule_launcher
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.progress import ProgressDisplay, make_progress, show_lines
from vlm.training.recorder import Recorder
from vlm.training.rehearsal import Brought, rehearse
from vlm.training.run_directory import RunDirectory
from vlm.training.schedule import LearningRate
from vlm.training.skips import check_bad_fraction, reasons_of
from vlm.training.state import restore_memory, restore_state
from vlm.training.step import TrainState
from vlm.training.together import ranks_together
from vlm.training.trainer import Trainer

REPORT = "report.html"
_SHOWN_PROBLEMS = 10


def train(recipe: Recipe, *, resume: str | None = None, allow_changes: bool = False) -> Path:
    """Run the recipe to its end and return the run directory. Collective under a launcher.

    `resume` is None for a new run, "auto" for the newest complete checkpoint (or a new run where there is none), or a
    checkpoint's folder. Raises UserError for what the user can mend; nothing is written before everything was checked.
    """
    output_folder(recipe.run, "run")
    require_trackers(recipe.trackers)
    recipe.optimizer.require_installed()
    require_towers_fit(recipe.model)
    check_files(recipe.evaluate, recipe.data.root)
    recipe = settled(recipe if resume is None else as_begun(recipe))
    overruled = overrule_launcher(recipe.engine, recipe.decided_precision, max_grad_norm=recipe.max_grad_norm)
    settings = engine_settings(recipe, recipe.max_grad_norm)
    together = ranks_together(
        settings, trackers=recipe.trackers, run=Path(recipe.run), patience=Patience(recipe.data.patience)
    )
    with together as (accelerator, watch):
        world = World.current(accelerator.device)
        require_same_start(world, recipe, {"--resume": resume, "--allow-changes": allow_changes})
        show_lines(world.is_main, place_lines(recipe, world, overruled))
        run = RunDirectory(Path(recipe.run), world)
        try:
            show_lines(world.is_main, _fetched(recipe, run, resume))
            start = find_start(run, recipe, resume, allow_changes=allow_changes)
            _train(recipe, settings, accelerator, watch, run, start)
            if world.is_main:
                _write_report(run)
            world.barrier()
        finally:
            run.release()
    return run.path


def _write_report(run: RunDirectory) -> None:
    from eval.report import write_report  # matplotlib takes its time to import

    with shown_progress():
        write_report([run.path], run.path / REPORT)


def _train(
    recipe: Recipe, settings: EngineSettings, accelerator: Accelerator, watch: Watch, run: RunDirectory, start: Start
) -> None:
    """Train from a start to the end of the run. Collective."""
    with shown_progress(is_main=run.world.is_main):
        parts = _checked_parts(recipe, run, start)
    objective = build_objective(recipe, parts.model, parts.source.num_samples, run.world)
    require_known_alarms(recipe, parts, objective)
    retention = retention_of(recipe, parts, objective.facts.num_steps)
    learning_rate = LearningRate.of_run(
        recipe.schedule,
        recipe.optimizer.lr,
        global_batch=recipe.global_batch,
        num_samples=objective.facts.num_samples,
        num_steps=objective.facts.num_steps,
    )
    attention = () if start.checkpoint is None else start.checkpoint.manifest.attention
    state = assemble(recipe, settings, accelerator, parts.model, objective, attention)
    if start.checkpoint is not None:
        _restore(start.checkpoint, state, parts)
    notices = [*_begin(recipe, state, parts, run, start), *_unread_parts(recipe, objective)]
    watch.teller.record_in(run.path)
    watch.lost_now = lambda: lost_words(run.checkpoint_steps())
    trackers = start_trackers(accelerator, recipe.trackers, run.path, recipe.model_dump(mode="json"), start.step)
    control = RunControl(objective.facts.num_steps, Clock(recipe.global_batch), Stops(watch, run.world, how_to_go_on()))
    with _progress(recipe, parts, run, start, control.num_steps) as progress:
        for line in notices:
            progress.say(line)
        stored = sum(source.num_samples for source in parts.source.sources)  # with documents, as the problems are
        check_bad_fraction(reasons_of(parts.source.problems), stored, parts.source.max_bad_share)
        progress.say("training begins: the first batch is being loaded")
        watched = [] if retention is None else [best.metric for best in retention.best]
        mirror = _mirror(recipe, run, start, progress.say)
        recorder = Recorder(run, trackers, build_alarms(recipe, parts), progress, recipe.global_batch, watched)
        trainer = Trainer(
            state,
            parts.source,
            build_hooks(recipe, state, parts, start, recorder, control),
            control,
            learning_rate=learning_rate,
            plan=MicroBatchPlan(recipe.global_batch, run.world.size, recipe.micro_batch),
            seed=recipe.seed,
        )
        watch.teller.facts = lambda: {"step": activity.step}
        with watch.keeping_requests(), watch.watching_for_hangs(_hang_watch(recipe, run)):
            try:
                trainer.run(start.step)
            except EveryRankError:
                with suppress(EveryRankError):  # why the run ends is the first of the two
                    run.settle()
                raise
            finally:
                if mirror is not None:
                    mirror.close()


def _mirror(recipe: Recipe, run: RunDirectory, start: Start, say: Callable[[str], None]) -> Mirror | None:
    """What copies the run's checkpoints to a store, on rank 0, where the recipe names one."""
    if recipe.sync is None or not run.world.is_main:
        return None
    leave_later(recipe.sync, start.step, recipe.data.retry)
    mirror = Mirror(run.path, recipe.sync, recipe.data.retry, say)
    run.saved = mirror.copy
    return mirror


def _fetched(recipe: Recipe, run: RunDirectory, resume: str | None) -> list[str]:
    """Reach the store that the recipe names; lines on what was fetched for a run whose folder is lost. Collective."""
    if recipe.sync is None:
        return []
    lines: list[str] = []
    problem = None
    if run.world.is_main:
        try:
            require_mirror(recipe.sync, recipe.data.retry, resuming=resume is not None)
            if resume == AUTO and not run.is_started:
                lines = fetch_run(recipe.sync, run.path, recipe.data.retry)
        except UserError as error:
            problem = str(error)
    (lines, problem), *_ = run.world.gather_objects((lines, problem))
    if problem is not None:
        raise EveryRankError(problem)
    return list(lines)


def _hang_watch(recipe: Recipe, run: RunDirectory) -> HangWatch | None:
    if recipe.hang_after is None:
        return None
    return HangWatch(recipe.hang_after, run.path, run.world.rank, run.world.size)


def _checked_parts(recipe: Recipe, run: RunDirectory, start: Start) -> RunParts:
    """Model, data and evaluations, after a rehearsal of the first step. Collective."""
    parts = build_parts(recipe, run.world, model_to_train(recipe, run, start.checkpoint))
    require_same_view(run.world, parts.records)
    if start.checkpoint is not None:
        require_same_data(start, parts.source)
        _reuse_threads(start.checkpoint.manifest, recipe, run.world)
    rehearse(
        parts.model,
        recipe.objective,
        recipe.providers,
        recipe.comparison,
        num_pairs=recipe.global_batch,
        brought=Brought(
            labels=parts.source.labelled,
            captions=any(recipe.data.caption_of(name).policy == "all" for name in recipe.data.sources),
            images=recipe.data.images,
            documents=recipe.data.documents is not None,
            degraded=recipe.data.degraded is not None,
            editors=recipe.data.editors,
        ),
    )
    return parts


def _restore(checkpoint: Checkpoint, state: TrainState, parts: RunParts) -> None:
    restore_state(checkpoint, state.engine, state.ema, state.teacher)
    restore_memory(checkpoint, state.objective)
    if state.spikes is not None:
        state.spikes.restore(checkpoint.manifest.spikes)
    parts.source.restore(checkpoint.manifest.stream)
    checkpoint.release()  # the run may prune it


def _begin(recipe: Recipe, state: TrainState, parts: RunParts, run: RunDirectory, start: Start) -> list[str]:
    """Write what the run is into its directory, and cut off what this life does not go on from; lines on it."""
    metrics = {evaluation.name: evaluation.evaluator.metrics for evaluation in parts.evaluations}
    facts = run_facts(recipe.engine, recipe.decided_precision, state.engine, parts.source, metrics)
    checkpoint = start.checkpoint
    folder = None if checkpoint is None else checkpoint.folder
    lines = run.start(recipe.model_dump(mode="json"), facts, start.step, folder)
    # Before the first step, what an earlier start found is dropped too: it is found again.
    lines += run.truncate_after(start.step if start.step else -1)
    run.drop_evaluations(start.step, () if checkpoint is None else checkpoint.manifest.pending)
    lines = [*start.notices, *lines, *parts.source.notices]
    if run.world.is_main:
        lines += [*parts.model.notices, *_untrained(state, parts)]
    problems = parts.source.problems
    run.log_skips([(0, problem) for problem in problems] if run.world.is_main and start.step == 0 else [])
    return [*lines, *_problem_lines(problems)]


@contextmanager
def _progress(
    recipe: Recipe, parts: RunParts, run: RunDirectory, start: Start, num_steps: int
) -> Iterator[ProgressDisplay]:
    """The display of a run's steps and, within them, of its evaluations."""
    is_main, num_samples = run.world.is_main, parts.source.num_samples
    lines = [data_line(parts.source, recipe.global_batch, num_steps, start.step)]
    show_lines(is_main, [*lines, *image_lines(parts.source.stages, num_steps)])
    progress = make_progress(is_main, start.step, num_steps, num_samples / recipe.global_batch)
    try:
        with on_progress(lambda work, done, total: progress.note(f"evaluating: {work} {done:,}/{total:,}")):
            yield progress
    finally:
        progress.close()


def _untrained(state: TrainState, parts: RunParts) -> list[str]:
    """A line on a captioning decoder that no term of the objective trains."""
    trains = any(name.startswith("decoder.") for name in state.engine.parameters())
    if parts.model.decoder is None or trains:
        return []
    return ["model.captioner: no term of the objective trains the decoder (caption): its weights stay as they are"]


def _unread_parts(recipe: Recipe, objective: Objective) -> list[str]:
    """Lines on what is read or made for nobody: images, counterfactual captions, degraded copies."""
    data, outputs = recipe.data, objective.needs.outputs | objective.needs.teacher_outputs
    lines = []
    if data.images and "image" not in outputs and not captioned_parts(outputs):
        lines.append("data.images: no term of the objective looks at images; false would leave them unread")
    if data.editors and COUNTERFACTUALS not in outputs:
        lines.append("data.counterfactuals: no term of the objective looks at them (counting, hard_negative_captions)")
    if data.degraded is not None and DEGRADED not in outputs:
        lines.append("data.degraded: no term of the objective looks at them (hard_negative_images)")
    return lines


def _problem_lines(problems: Sequence[Skip]) -> list[str]:
    """Lines on what was unusable at the start; the ledger names all of it."""
    lines = [f"skipped: {problem.shard} {problem.key}: {problem.reason}" for problem in problems[:_SHOWN_PROBLEMS]]
    more = len(problems) - len(lines)
    return [*lines, f"skipped: {more:,} more, named in ledger.jsonl"] if more else lines


def _reuse_threads(manifest: Manifest, recipe: Recipe, world: World) -> None:
    """The order of sums on a CPU depends on the number of threads: a resumed run takes that of its checkpoint."""
    if (manifest.engine, manifest.world_size) == (recipe.engine, world.size):
        torch.set_num_threads(manifest.threads)
