"""The one door through which text becomes a path: names, paths that users give, reads below a folder, outputs.

Nothing that stands in a recipe, a manifest, a shard or an option becomes a path elsewhere without having been here.
"""

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, StringConstraints

from vlm.atomic import write_bytes
from vlm.errors import UserError

NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.-]*"
MAX_NAME = 100
"""Characters of a name: with what we add to it, it fits into one part of a path (255 bytes) everywhere."""
_NAME = re.compile(NAME_PATTERN)
_NAME_BYTES = 255
# Control characters, those that turn the direction of a line, and bytes that are no text.
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# pathlib makes s3:/bucket of s3://bucket; a single letter would be a drive.
_ADDRESS = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)(?:::|:/)|^(pipe):")

Value = TypeVar("Value")


def require_name(name: Any, what: str = "the name") -> str:
    """`name`, which may become a part of a path. Raises UserError, which begins with `what`, where it may not."""
    if isinstance(name, str) and _NAME.fullmatch(name) and len(name) <= MAX_NAME:
        return name
    raise UserError(
        f"{what} {shown(name)} may become a file name: write at most {MAX_NAME} of A-Z, a-z, 0-9, '_', '.' and '-', "
        "a letter or digit first"
    )


def require_names(names: Iterable[Any]) -> None:
    """Raise UserError for the first that is no name, or that differs from another one only in case."""
    names_by_case: dict[str, str] = {}
    for name in names:
        other = names_by_case.setdefault(require_name(name).casefold(), name)
        if other != name:
            raise UserError(f"the names {other} and {name} differ only in case: on some disks they are one file")


def _with_names(value: Any) -> Any:
    if isinstance(value, dict):
        require_names(value)
    return value


Named = Annotated[
    dict[Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN}$", max_length=MAX_NAME)], Value],
    BeforeValidator(_with_names),
]
"""A mapping of a recipe whose keys are names."""


def shown(text: Any) -> str:
    """Text of unknown origin for a line on a terminal: short, in quotes, without control characters."""
    quoted = ascii(text)
    return quoted if len(quoted) <= 80 else f"{quoted[:70]}...'"


def address_kind(text: str | Path) -> str | None:
    """The scheme of a remote address ("s3" of s3://bucket), "pipe" of a command; None for a path."""
    match = _ADDRESS.match(str(text))
    return (match[1] or match[2]) if match else None


def local_path(text: str | Path, where: str) -> Path:
    """The path that a user means, `~` replaced. Raises UserError, which begins with `where`, for anything else.

    Remote addresses, commands, the empty text, control characters and parts too long for any disk are refused.
    """
    try:
        return Path(_local(str(text)))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _local(text: str) -> str:
    kind = address_kind(text)
    if kind is not None:
        advice = "write the path alone" if kind == "file" else "a path on this machine is needed"
        raise ValueError(f"{shown(text)} is no local path but an address ({kind}); {advice}")
    if not text:
        raise ValueError("the path is empty")
    if _NO_TEXT.search(text):
        raise ValueError(f"{shown(text)} holds characters that no path should")
    long = next((name for name in Path(text).parts if len(os.fsencode(name)) > _NAME_BYTES), None)
    if long is not None:
        raise ValueError(f"{shown(long)} is longer than the {_NAME_BYTES} bytes of a file name")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ValueError(f"{shown(text)}: there is no such user") from None


LocalPath = Annotated[str, AfterValidator(_local)]
"""A path of a recipe on this machine, `~` replaced."""


def below(folder: Path, name: str, where: str) -> Path:
    """The regular file (or nothing yet) that `name`, out of some file's own data, stands for below `folder`.

    Raises:
        UserError: it begins with `where`; the name is absolute, leads out of the folder (also by a symbolic link), or
            means a folder, a device or a FIFO.
    """
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or _NO_TEXT.search(name):
        raise UserError(f"{where}: {shown(name)} does not lie below {folder}")
    try:
        real = path.resolve()
        if not real.is_relative_to(folder.resolve()):
            raise UserError(f"{where}: {path} is a link that leads out of {folder}")
        if real.exists() and not real.is_file():
            raise UserError(f"{where}: {path} is {kind_of(real)}, not a file")
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long
        raise UserError(f"{where}: {shown(str(path))} cannot be read ({getattr(error, 'strerror', error)})") from None
    return path


def kind_of(path: Path) -> str:
    """The kind of thing under a path, in words."""
    mode = path.stat().st_mode
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a file",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no file")


def output_file(text: str | Path, where: str) -> Path:
    """The path of a file that `write_output` will be able to write: to be asked before the work that fills it.

    Raises:
        UserError: it begins with `where`; the path is no local one, a folder, a socket or disk, or its folder is
            missing or cannot be written to.
    """
    path = local_path(text, where)
    try:
        real = _real(path, where)
        if real.is_dir():
            raise UserError(f"{where}: {path} is a folder; name a file in it")
        if _is_stream(real):
            if not os.access(real, os.W_OK):
                raise UserError(f"{where}: {path} cannot be written: no permission")
        else:
            _require_plain(real, path, where)
            _require_writable(real.parent, path, where)
    except OSError as error:
        raise _refused(path, where, error) from None
    return path


def output_folder(text: str | Path, where: str, *, parents: bool = True, files: Iterable[str] = ()) -> Path:
    """The path of a folder, there or not, into which files can be written: to be asked before the work.

    Raises:
        UserError: it begins with `where`; the path is no local one, or no folder, or cannot be made or written to, or
            the folder above is missing although it is not to be made (`parents` False), or one of the `files` to come
            cannot be written.
    """
    path = local_path(text, where)
    try:
        real = _real(path, where)
        if real.exists() and not real.is_dir():
            raise UserError(f"{where}: {path} is {kind_of(real)}, not a folder")
        if not parents and not real.parent.is_dir():
            raise UserError(f"{where} {path}: there is no folder {real.parent}")
        there = next(folder for folder in (real, *real.parents) if folder.exists())
        _require_writable(there, path, where)
    except OSError as error:
        raise _refused(path, where, error) from None
    if path.is_dir():
        for name in files:
            output_file(path / name, where)
    return path


def new_folder(text: str | Path, where: str) -> Path:
    """As `output_folder`, of a folder that is missing or empty. Raises UserError where it is not."""
    path = output_folder(text, where)
    if path.absolute().is_mount():
        raise UserError(f"{where}: {path} is a mount point and cannot be replaced; name a folder below it")
    if path.is_symlink() or (path.is_dir() and any(path.iterdir())):
        what = "a link" if path.is_symlink() else "not empty"
        raise UserError(f"{where}: {path} is {what}; name a new or an empty folder")
    return path


def write_output(path: Path, content: str | bytes, where: str) -> None:
    """Write a file that a user named: whole or not at all; a link is followed; into a device or FIFO, never over it.

    Raises:
        UserError: it begins with `where`; the file cannot be written, or nobody reads the FIFO.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        real = _real(path, where)
        if not _is_stream(real):
            _require_plain(real, path, where)
            write_bytes(real, data)
            return
        # Without O_NONBLOCK, opening a FIFO would wait for a reader that may never come.
        descriptor = os.open(real, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        raise _refused(path, where, error) from None


def _real(path: Path, where: str) -> Path:
    """Where a path leads, by way of links; the file itself need not be there."""
    try:
        real = path.resolve()
    except RuntimeError:
        raise UserError(f"{where}: {path} is a link that leads to itself") from None
    if path.is_symlink() and not real.parent.is_dir():
        raise UserError(f"{where}: {path} is a link to {real}, whose folder is not there")
    # Of a pipe or terminal behind /dev/stdout nothing is left but its name in /proc.
    return path if path.exists() and not real.exists() else real


def _is_stream(path: Path) -> bool:
    return path.exists() and (path.is_char_device() or path.is_fifo())


def _require_plain(real: Path, path: Path, where: str) -> None:
    if not real.parent.is_dir():
        raise UserError(f"{where} {path}: there is no folder {real.parent}")
    if real.exists() and not real.is_file():
        raise UserError(f"{where}: {path} is {kind_of(real)}, not a file")
    if real.exists() and not os.access(real, os.W_OK):
        raise UserError(f"{where}: {path} cannot be written: no permission")


def _require_writable(folder: Path, path: Path, where: str) -> None:
    """Permissions do not tell all (read-only disks, quotas, /proc): a nameless file is made."""
    if not folder.is_dir():
        raise UserError(f"{where}: {path} cannot be made: {folder} is {kind_of(folder)}, not a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _refused(path, where, error) from None


def _refused(path: Path, where: str, error: OSError) -> UserError:
    nobody = "nobody reads this FIFO" if error.errno == errno.ENXIO else error.strerror or str(error)
    return UserError(f"{where}: {path} cannot be written: {nobody}")
