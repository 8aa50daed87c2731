"""A run's folder of checkpoints: which are complete, which are old or read, which were left for a new way."""

import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from vlm.aside import remove_files
from vlm.atomic import flush_to_disk
from vlm.checkpoint.retention import Retention

MANIFEST = "manifest.json"
PARTIAL = ".partial"
FILES = r"manifest\.json|[\w.-]+-\d{5,}\.safetensors|\.[\w.-]+\.partial|\.tmp[A-Za-z0-9]{6}"
"""The files of a checkpoint (the last is what safetensors writes first): nothing else in its folder is removed."""
_FOLDER = re.compile(r"step-(\d{8,18})")
_UNFINISHED = re.compile(r"step-\d{8,18}(\.old(-\d+)?)?\.partial")


def folder_name(step: int) -> str:
    """The name of the checkpoint folder after `step` steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """After how many steps the checkpoint in a folder of this name was written; None for any other name."""
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match and folder_name(int(match[1])) == folder.name else None


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """All complete checkpoints below `folder` by step, oldest first."""
    by_step = {step_of(path): path for path in folder.glob("step-*") if (path / MANIFEST).is_file()}
    return {step: by_step[step] for step in sorted(step for step in by_step if step is not None)}


def checkpoint_at(path: Path) -> Path | None:
    """The checkpoint that `path` is, or the newest complete one of the run that it is; None where it is neither."""
    if os.path.isfile(path / MANIFEST):  # which says False, too, of a name that is too long for any path
        return path
    if not os.path.isdir(path / "checkpoints"):
        return None
    return next(reversed(complete_checkpoints(path / "checkpoints").values()), None)


def clear_unfinished(folder: Path) -> None:
    """Remove what a crash left of checkpoints that were never completed; what somebody else put there stays."""
    for path in folder.glob(f"step-*{PARTIAL}"):
        if _UNFINISHED.fullmatch(path.name):
            remove_files(path, FILES)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that a crash on the way leaves it whole, or marked as unfinished.

    Only files of a checkpoint are deleted: others, and a folder that a link leads to, stay under the name of the rest.
    """
    delete([_put_away(path)])


def delete(put_away: Iterable[Path]) -> None:
    """Delete the files of checkpoints that have the names of a rest."""
    for path in put_away:
        remove_files(path, FILES)


def _put_away(path: Path) -> Path:
    """Give a checkpoint the name of a rest, by which it is none any more; the new path."""
    doomed = next(name for name in _names_of_rest(path) if not os.path.lexists(name) or remove_files(name, FILES))
    os.rename(path, doomed)
    return doomed


def _names_of_rest(path: Path) -> Iterator[Path]:
    yield path.with_name(f"{path.name}.old{PARTIAL}")
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}.old-{number}{PARTIAL}")


def put_away(
    folder: Path,
    retention: Retention | None,
    step: int,
    good_steps: Collection[int] = (),
    figures: Mapping[str, Mapping[int, float]] | None = None,
) -> list[Path]:
    """Take their names from checkpoints up to `step` that are not kept (None: keep all), nor newest up to a good step.

    `step` is where the run is: what lies beyond it is of another life, and neither counted nor touched. One that
    somebody reads stays until the next time. Returns what is to be deleted, which takes longer.
    """
    if retention is None:
        return []
    complete = {saved: path for saved, path in complete_checkpoints(folder).items() if saved <= step}
    good = {max((saved for saved in complete if saved <= limit), default=None) for limit in good_steps}
    kept = good | retention.kept(list(complete), figures or {})
    return [_put_away(path) for saved, path in complete.items() if saved not in kept and not is_read(path)]


def hold(checkpoint: Path) -> int | None:
    """Keep a checkpoint from being pruned until `let_go` of the result; None where the disk has no locks."""
    try:
        descriptor = os.open(checkpoint / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def let_go(descriptor: int) -> None:
    """Undo `hold`, for the forks of this process too."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_read(checkpoint: Path) -> bool:
    """Whether somebody holds the checkpoint, on this machine or by a disk that has locks."""
    try:
        descriptor = os.open(checkpoint / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def move(checkpoints: Iterable[Path], into: Path) -> None:
    """Move checkpoints, oldest first, into another folder of the same disk; the last to go is the newest."""
    for path in checkpoints:
        os.rename(path, into / path.name)


def adopt(checkpoint: Path, step: int, folder: Path) -> None:
    """Give `folder` the checkpoint of `step` that lies elsewhere, linked where the disk can; nothing if it has it.

    Its own files alone come along; where they are symbolic links, as in the cache of a hub, what they lead to.
    """
    target = folder / folder_name(step)
    if (target / MANIFEST).is_file():
        return
    aside = folder / f"{target.name}{PARTIAL}"
    aside.mkdir(exist_ok=True)  # what somebody else put there is still in it
    for file in checkpoint.iterdir():
        if not (re.fullmatch(FILES, file.name) and file.is_file()):
            continue
        try:
            os.link(file.resolve(), aside / file.name)
        except OSError:
            shutil.copyfile(file, aside / file.name)
    flush_to_disk(aside)
    if target.exists():
        remove_checkpoint(target)
    aside.rename(target)
    flush_to_disk(folder)
