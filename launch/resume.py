"""From where a run goes on: which of its checkpoints is the newest whole one, and whether it may."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.loading.sequential import SequentialStream
from data.loading.stream import TrainStream
from launch.model_source import empty_model_of
from launch.recipe import Recipe, changed_keys, check_recipe, moved_keys
from vlm.checkpoint.data_record import differences, is_known
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import NewerCheckpointError
from vlm.errors import EveryRankError, UserError
from vlm.model.build import build_model
from vlm.model.dual_encoder import DualEncoder
from vlm.paths import local_path
from vlm.programs import imported_towers, programs
from vlm.sealed import read_yaml_mapping
from vlm.training.run_directory import RunDirectory
from vlm.training.run_files import RECIPE

AUTO = "auto"


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on: a whole checkpoint, or None for the first step; and lines to tell of it.

    `moved` are the keys of the recipe by which the data lies in another place than before.
    """

    checkpoint: Checkpoint | None
    notices: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The steps that are done."""
        return 0 if self.checkpoint is None else self.checkpoint.manifest.step


def as_begun(recipe: Recipe) -> Recipe:
    """The recipe with the precision that its run began with, where it leaves it open; the same where there is no run.

    Raises UserError for a run whose recipe is damaged.
    """
    path = Path(recipe.run) / RECIPE
    if recipe.precision != "auto" or not path.is_file():
        return recipe
    begun = read_yaml_mapping(path).get("precision")
    return recipe.model_copy(update={"precision": begun}) if begun in ("fp32", "bf16") else recipe


def find_start(run: RunDirectory, recipe: Recipe, resume: str | None, *, allow_changes: bool) -> Start:
    """Claim the run directory and find from where to go on there. Collective.

    `resume` is None for a new run, "auto" for the newest whole checkpoint (or a new run where none was saved yet), or a
    checkpoint's folder.

    Raises:
        UserError: the folder is another's, the recipe has changed, a file of the run is damaged, or no checkpoint that
            could be gone on from is left.
    """
    taken_over = run.claim(resuming=resume is not None)
    notices = [] if taken_over is None else [taken_over]
    if resume is None:
        return Start(None, tuple(notices))
    moved: tuple[str, ...] = ()
    if run.was_started:
        run.require_undamaged()
        stored = run.recipe()
        if not allow_changes:
            moved = _require_same_recipe(run, stored, recipe)
        if Path(str(stored.get("run"))).resolve() != run.path.resolve():
            notices.append(f"{run.path} was copied or moved from {stored.get('run')!a}: it goes on where it lies")
    if resume != AUTO:
        checkpoint, problem = _undamaged(local_path(resume, "--resume"), run)
        if checkpoint is None:
            raise EveryRankError(problem)
        return Start(checkpoint, (*notices, _resuming_from(checkpoint)), moved)
    newest = _newest_undamaged(run)
    return Start(newest.checkpoint, (*notices, *newest.notices), moved)


def _newest_undamaged(run: RunDirectory) -> Start:
    """The newest checkpoint that is as it was written; those passed over are told. Collective."""
    passed_over: list[str] = []
    for path in reversed(run.complete_checkpoints()):
        checkpoint, problem = _undamaged(path, run)
        if checkpoint is not None:
            return Start(checkpoint, (*passed_over, _resuming_from(checkpoint)))
        passed_over.append(f"{path} is passed over: {problem}")
    if passed_over:
        raise EveryRankError(f"{run.checkpoints}: no checkpoint is whole; {'; '.join(passed_over)}")
    saved = run.last_saved()
    if saved is not None:
        raise EveryRankError(
            f"{run.path}: the run saved checkpoints, the last after step {saved}, and none is left in "
            f"{run.checkpoints}; put one back, or begin anew with another run=DIR"
        )
    return Start(None, ("no checkpoint was saved yet: beginning at step 0",) if run.was_started else ())


def _resuming_from(checkpoint: Checkpoint) -> str:
    return f"resuming from step {checkpoint.manifest.step} ({checkpoint.folder})"


def _undamaged(path: Path, run: RunDirectory) -> tuple[Checkpoint | None, str]:
    """The checkpoint if no rank finds anything wrong with it, or else what is wrong. Collective."""
    checkpoint, problem, newer = None, "", False
    try:
        checkpoint = Checkpoint(path)
    except UserError as error:
        problem, newer = str(error), isinstance(error, NewerCheckpointError)
    for message, is_newer in run.world.gather_objects((problem, newer)):
        if is_newer:
            raise EveryRankError(message)
        problem = problem or message
    if problem or checkpoint is None:
        return None, problem
    try:
        checkpoint.verify(run.world)
    except EveryRankError as error:
        return None, str(error)
    return checkpoint, ""


def _require_same_recipe(run: RunDirectory, stored: dict[str, Any], recipe: Recipe) -> tuple[str, ...]:
    """Raise where what is learned would change; keys that a newer version added count as their defaults.

    Returns the keys by which only the place of the data differs.
    """
    before, after = _checked(run, stored, recipe), recipe.model_dump(mode="json")
    changed = changed_keys(before, after)
    if changed:
        raise EveryRankError(
            f"{run.path}: the recipe has changed since the run began ({', '.join(changed)}); "
            "--allow-changes goes on all the same"
        )
    return tuple(moved_keys(before, after))


def _checked(run: RunDirectory, stored: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The run's own recipe with defaults written out, unless it is none, or names programs that are not `recipe`'s."""
    trusted = programs(recipe.model_dump(mode="json"))
    if any(program not in trusted for program in programs(stored)):
        return stored
    try:
        return check_recipe(stored, str(run.path)).model_dump(mode="json")
    except UserError:
        return stored


def model_to_train(recipe: Recipe, run: RunDirectory, checkpoint: Checkpoint | None) -> DualEncoder:
    """The recipe's model; that of a resumed run is made of its checkpoint, and needs no other file any more."""
    if checkpoint is None or not run.was_started:
        return build_model(recipe.model, recipe.seed)
    changed = changed_keys(_checked(run, run.recipe(), recipe), recipe.model_dump(mode="json"))
    if any(key.startswith("model.") for key in changed):
        return build_model(recipe.model, recipe.seed)
    # A checkpoint of a version that kept no files names them, as the recipe does.
    return empty_model_of(checkpoint, trust=True, trusted=imported_towers(recipe.model_dump(mode="json")))


def require_same_data(start: Start, source: TrainStream | SequentialStream) -> None:
    """Refuse to go on with other samples than those that the run had, wherever they lie now.

    Raises:
        EveryRankError: something differs, or the data was moved and nothing tells whether it does.
    """
    if start.checkpoint is None:
        return
    folder = start.checkpoint.folder
    before, now = start.checkpoint.manifest.data, {summary.name: summary.record for summary in source.sources}
    changes = differences(before, now, {summary.name: summary.shards for summary in source.sources})
    if changes is not None:
        raise EveryRankError(f"{folder}: the data has changed since the checkpoint: {changes}")
    if start.moved and not (is_known(before) and is_known(now)):
        raise EveryRankError(
            f"{folder}: {', '.join(start.moved)} changed, and of the data only the number of samples was kept, so "
            "nothing tells whether it is the same; --allow-changes goes on all the same"
        )
