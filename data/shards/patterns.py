"""From what a user writes for shards to the names that it means."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from data.shards.braces import expand_braces
from data.shards.manifest import NAME, TEXTS
from data.shards.remote import scheme
from data.shards.sidecar import SUFFIX as SIDECAR
from data.shards.store import is_command, is_remote, list_remote, require_store
from vlm.errors import UserError, nearest
from vlm.paths import kind_of, shown

_WILD = re.compile(r"[*?\[]")
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f]")
_SPARE = re.compile(r"/(?:\.?/)+")  # what may be between two parts of a path without a meaning


def expand_shards(patterns: Sequence[str], root: str | None, where: str) -> tuple[str, ...]:
    """The shards that brace and glob `patterns` below `root` name, each once, in the order written (globs sorted).

    A local shard must be there. A remote one is taken at its word; a remote `*` asks the store for the names in that
    folder, which not every store (https) can tell. `root` is no pattern, nor are the leading folders of a local pattern
    that are there under this very name, whatever brackets and braces are in it.

    Raises:
        UserError: a pattern matches nothing or names a file that is not there; `where` is the key to blame.
    """
    if not patterns:
        raise UserError(f"{where}: no shards are named")
    if root is not None and _NO_TEXT.search(root):
        raise UserError(f"{where}: the root {shown(root)} names no folder")
    if root is not None and is_command(root):
        raise UserError(f"{where}: the root {root} is a command, not a folder")
    distinct: dict[str, str] = {}
    for pattern in patterns:
        if not pattern or _NO_TEXT.search(pattern):
            raise UserError(f"{where}: {shown(pattern)} names no shard")
        for name in _expand(pattern, root, where):
            distinct.setdefault(_identity(name), name)
    return tuple(distinct.values())


def require_no_command(names: Sequence[str], where: str) -> None:
    """Raise UserError for a shard that is the output of a command, which only a streaming run asks for."""
    if (command := next(filter(is_command, names), None)) is not None:
        raise UserError(
            f"{where}: {command} is a command, whose output has no index: in training, "
            "`data.mode: sequential` streams it; elsewhere, store it as a shard first"
        )


def _expand(pattern: str, root: str | None, where: str) -> list[str]:
    if is_command(pattern):
        return [pattern]  # its braces and stars are the shell's
    if is_remote(pattern):
        return _remote("", pattern, pattern, where)
    if root is not None and is_remote(root):
        return _remote(f"{root.rstrip('/')}/", pattern, pattern, where)
    try:
        return _local(*_places(root, pattern), pattern, where)
    except OSError as error:
        raise UserError(f"{where}: {shown(pattern)}: {error.strerror or error}") from error


def _identity(name: str) -> str:
    """The same for two ways to write one path; links stay apart, which may be meant to count twice."""
    if is_remote(name):
        return name
    folder, _, base = name.rpartition("/")
    return f"{os.path.realpath(folder)}/{base}" if "/../" in name else os.path.abspath(name)


def _braces(pattern: str, written: str, where: str) -> list[str]:
    try:
        return expand_braces(pattern)
    except ValueError as error:
        raise UserError(f"{where}: {shown(written)}: {error}") from error


def _remote(folder: str, pattern: str, written: str, where: str) -> list[str]:
    try:
        require_store(folder + pattern)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    names: list[str] = []
    for name in _braces(pattern, written, where):
        if not _is_wild(folder, name):
            names.append(folder + name)
            continue
        matches = sorted(filter(_is_shard, list_remote(_literal(folder) + name, where)))
        if not matches:
            raise UserError(f"{where}: {written} matches nothing")
        names += matches
    return names


def _is_wild(folder: str, name: str) -> bool:
    """Whether a store would have to be asked: what an address says after its path, or of its host, is no pattern."""
    path = name if folder else name.partition("://")[2]
    if scheme(folder + name) in ("http", "https"):
        path = path.partition("?")[0] if folder else path.partition("?")[0].partition("/")[2]
    return bool(_WILD.search(path.partition("?versionId=")[0]))


def _literal(folder: str) -> str:
    start, _, path = folder.partition("://")
    return start + "://" + _WILD.sub(r"[\g<0>]", path) if folder else ""


def _places(root: str | None, pattern: str) -> tuple[str, str]:
    """The folder that is meant as it is written, and the pattern below it."""
    pattern = os.path.expanduser(pattern.removeprefix("file://"))
    folder = "/" if pattern.startswith("/") else os.path.expanduser((root or ".").removeprefix("file://"))
    names = _SPARE.sub("/", pattern).lstrip("/").removeprefix("./").split("/")
    if _WILD.search(pattern) or "{" in pattern:
        there = (depth for depth in range(len(names) - 1, 0, -1) if os.path.isdir(os.path.join(folder, *names[:depth])))
        depth = next(there, 0)
        folder, names = os.path.join(folder, *names[:depth]), names[depth:]
    return folder, "/".join(names)


def _local(folder: str, pattern: str, written: str, where: str) -> list[str]:
    path = os.path.join(folder, pattern)
    if os.path.isfile(path):
        return [path]
    names = _braces(pattern, written, where)
    return [path for name in names for path in _files(folder, name, written, where)]


def _files(folder: str, name: str, written: str, where: str) -> list[str]:
    full = os.path.join(folder, name)
    if os.path.isfile(full):  # not by Path, which takes twice as long: there may be 100,000
        return [full]
    path = Path(full)
    if path.is_dir():
        raise UserError(f"{where}: {full} is a folder; name its shards, as in {full.rstrip('/')}/*.tar")
    if path.exists():
        raise UserError(f"{where}: {full} is {kind_of(path)}, not a file")
    if glob.has_magic(name):
        paths = (os.path.join(folder, match) for match in glob.glob(name, root_dir=folder, recursive=True))
        matches = sorted(match for match in paths if _is_shard(match) and os.path.isfile(match))
        if matches:
            return matches
        raise UserError(f"{where}: {written} matches no file ({_around(path)})")
    raise UserError(f"{where}: {written}: there is no file {full} ({_around(path)})")


def _is_shard(name: str) -> bool:
    """Whether a match of a pattern is no index of ours."""
    return not name.endswith((SIDECAR, NAME, TEXTS))


def _around(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return nearest(path.name, [entry.name for entry in path.parent.iterdir() if ".tar" in entry.name])
