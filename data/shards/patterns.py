"""From what a user writes for shards to the files that it means."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from vlm.errors import UserError, nearest

_REMOTE = re.compile(r"^([a-z][a-z0-9+.-]*://|pipe:)")


def expand_shards(patterns: Sequence[str], root: str | None, where: str) -> tuple[Path, ...]:
    """The files that brace and glob `patterns` below `root` name, each once, in the order written (globs sorted).

    Raises:
        UserError: a pattern matches nothing or names a file that is not there; `where` is the key to blame.
    """
    if not patterns:
        raise UserError(f"{where}: no shards are named")
    found: dict[Path, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_expand(pattern, root, where)))
    return tuple(found)


def _expand(pattern: str, root: str | None, where: str) -> list[Path]:
    if _REMOTE.match(pattern):
        raise UserError(f"{where}: {pattern}: shards are read from local files; copy them first")
    full = os.path.expanduser(pattern)
    if not os.path.isabs(full):
        full = os.path.join(os.path.expanduser(root or "."), full)
    try:
        names = list(braceexpand.braceexpand(full))
    except ValueError as error:
        raise UserError(f"{where}: {pattern}: {error}") from error
    return [path for name in names for path in _files(name, pattern, where)]


def _files(name: str, pattern: str, where: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise UserError(f"{where}: {name} is a folder; name its shards, as in {name.rstrip('/')}/*.tar")
    if glob.has_magic(name):
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
        if matches:
            return matches
        raise UserError(f"{where}: {pattern} matches no file ({_around(path)})")
    raise UserError(f"{where}: {pattern}: there is no file {name} ({_around(path)})")


def _around(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return nearest(path.name, [entry.name for entry in path.parent.iterdir() if ".tar" in entry.name])
