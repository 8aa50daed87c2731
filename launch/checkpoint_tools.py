"""What people do with the checkpoints of a run: check that they are whole, and delete old ones."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.shards.store import is_remote
from eval.run_record import read_run
from launch.checkpoint_copy import all_stored, verify_stored
from vlm.checkpoint.folder import complete_checkpoints, is_read, remove_checkpoint
from vlm.checkpoint.format import Checkpoint
from vlm.checkpoint.manifest import Manifest
from vlm.checkpoint.retention import Best, Retention
from vlm.distributed.world import World
from vlm.errors import UserError, nearest
from vlm.paths import local_path
from vlm.training.owner import Owner

_EVAL = "eval/"


def verified(places: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """Whether each checkpoint, and each of each run, here or in a store, is as it was written, with a line on it.

    Raises:
        UserError: a place is neither a checkpoint nor a run with one.
    """
    for place in places:
        if is_remote(place):
            yield from _verified_in_store(place.rstrip("/"))
            continue
        path = local_path(place, "verify")
        of_a_run = list(complete_checkpoints(path / "checkpoints").values())
        for folder in of_a_run or [path]:
            try:
                checkpoint = Checkpoint(folder)
                checkpoint.verify(World())
            except UserError as error:
                yield False, f"fail  {error}"
            else:
                yield True, _whole(str(folder), checkpoint.manifest)


def _verified_in_store(url: str) -> Iterator[tuple[bool, str]]:
    try:
        stored = all_stored(url)
    except OSError as error:
        raise UserError(f"verify: {error}") from None
    if not stored:
        raise UserError(f"verify: {url} is neither a checkpoint nor a run with a complete one")
    for one in reversed(stored):
        try:
            yield True, _whole(one, verify_stored(one))
        except (UserError, OSError) as error:
            yield False, f"fail  {error}"


def _whole(place: str, manifest: Manifest) -> str:
    size = sum(record.bytes for record in manifest.files.values())
    return f"ok    {place}: {len(manifest.files)} files, {size / 1e9:.3g} GB"


def pruned(run: str, last: int, every: int | None, best: Mapping[str, int], *, dry_run: bool) -> list[str]:
    """Delete the checkpoints of a run that none of the rules keeps; a line on each. `dry_run`: nothing is deleted.

    `every` keeps the multiples of so many steps, `best` so many of the best by figures eval/EVALUATION/METRIC.

    Raises:
        UserError: the folder is no run, or another process writes to it; a figure is unknown, or has no better side.
    """
    folder = local_path(run, "prune")
    saved = complete_checkpoints(folder / "checkpoints")
    if not saved:
        raise UserError(f"prune: {run} is no run with a complete checkpoint")
    record = read_run(folder)
    for name in best:
        key = name.removeprefix(_EVAL)
        if not name.startswith(_EVAL) or key not in record.evaluations:
            raise UserError(
                f"prune: --best {name}: the run did not measure it; "
                f"{nearest(name, [_EVAL + known for known in record.evaluations])}"
            )
        if record.metric(key).better is None:
            raise UserError(f"prune: --best {name}: neither higher nor lower values of it are better")
    ways = (
        Best(name, count, record.metric(name.removeprefix(_EVAL)).better == "higher") for name, count in best.items()
    )
    figures = {name: dict(record.evaluations[name.removeprefix(_EVAL)]) for name in best}
    kept = Retention(last, 1, every, tuple(ways)).kept(list(saved), figures)
    owner = Owner(folder)
    owner.take()
    try:
        return [_line(path, keep=step in kept, dry_run=dry_run) for step, path in saved.items()]
    finally:
        owner.release()


def _line(path: Path, *, keep: bool, dry_run: bool) -> str:
    if keep:
        return f"kept     {path}"
    if is_read(path):
        return f"kept     {path} (another process reads it)"
    if dry_run:
        return f"would go {path}"
    remove_checkpoint(path)
    return f"deleted  {path}"
