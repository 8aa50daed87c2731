"""From what a user writes for shards to the names that it means."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from data.shards.manifest import NAME, TEXTS
from data.shards.sidecar import SUFFIX as SIDECAR
from data.shards.store import is_remote, list_remote, require_store
from vlm.errors import UserError, nearest

_WILD = re.compile(r"[*?\[]")


def expand_shards(patterns: Sequence[str], root: str | None, where: str) -> tuple[str, ...]:
    """The shards that brace and glob `patterns` below `root` name, each once, in the order written (globs sorted).

    A local shard must be there. A remote one is taken at its word; a remote `*` asks the store for the names in that
    folder, which not every store (https) can tell.

    Raises:
        UserError: a pattern matches nothing or names a file that is not there; `where` is the key to blame.
    """
    if not patterns:
        raise UserError(f"{where}: no shards are named")
    found: dict[str, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_expand(pattern, root, where)))
    return tuple(found)


def _expand(pattern: str, root: str | None, where: str) -> list[str]:
    full = _below(root, pattern)
    if full.startswith("pipe:"):
        return [full]  # a command: its braces and stars are the shell's
    try:
        names = list(braceexpand.braceexpand(full))
    except ValueError as error:
        raise UserError(f"{where}: {pattern}: {error}") from error
    if is_remote(full):
        _require_store(full, where)
        return [name for written in names for name in _remote(written, pattern, where)]
    return [name for written in names for name in _files(written, pattern, where)]


def _below(root: str | None, pattern: str) -> str:
    if is_remote(pattern):
        return pattern
    if root is not None and is_remote(root):
        return f"{root.rstrip('/')}/{pattern}"
    full = os.path.expanduser(pattern)
    return full if os.path.isabs(full) else os.path.join(os.path.expanduser(root or "."), full)


def _require_store(name: str, where: str) -> None:
    try:
        require_store(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _remote(name: str, pattern: str, where: str) -> list[str]:
    if not _WILD.search(name.partition("://")[2]):
        return [name]
    matches = sorted(filter(_is_shard, list_remote(name, where)))
    if not matches:
        raise UserError(f"{where}: {pattern} matches nothing")
    return matches


def _files(name: str, pattern: str, where: str) -> list[str]:
    if os.path.isfile(name):  # not by Path, which takes twice as long: there may be 100,000
        return [name]
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{where}: {name} is a folder; name its shards, as in {name.rstrip('/')}/*.tar")
    if glob.has_magic(name):
        found = sorted(glob.glob(name, recursive=True))
        matches = [match for match in found if _is_shard(match) and os.path.isfile(match)]
        if matches:
            return matches
        raise UserError(f"{where}: {pattern} matches no file ({_around(path)})")
    raise UserError(f"{where}: {pattern}: there is no file {name} ({_around(path)})")


def _is_shard(name: str) -> bool:
    """Whether a match of a pattern is no index of ours."""
    return not name.endswith((SIDECAR, NAME, TEXTS))


def _around(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return nearest(path.name, [entry.name for entry in path.parent.iterdir() if ".tar" in entry.name])
