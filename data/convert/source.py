"""From what a user names to a table: by the kind of the file, or of the folder."""

import glob
from dataclasses import dataclass, field
from pathlib import Path

from data.convert.coco import read_json
from data.convert.columns import ColumnOptions
from data.convert.delimited import read_delimited
from data.convert.folder import read_folder
from data.convert.jsonl import JsonLinesTable
from data.convert.parquet import ParquetTable
from data.convert.table import SourceTable
from vlm.errors import UserError, nearest
from vlm.paths import local_path

_DELIMITED = (".csv", ".tsv", ".txt", ".token", ".psv")
_PARQUET = (".parquet", ".pq")
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class BuildSource:
    """A table, a folder of Parquet files, or an image folder, perhaps with a `captions` table for it.

    Image paths start at `root`: by default the image folder, or the folder that the table lies in. `class_folders`
    makes the folders of an image folder classes; `classes` is a file of class names, by number.
    """

    path: str
    root: Path | None = None
    captions: Path | None = None
    columns: ColumnOptions = field(default_factory=ColumnOptions)
    class_folders: bool = False
    classes: str | None = None

    @property
    def image_root(self) -> Path:
        """The folder in which relative image paths start."""
        path = Path(self.path).expanduser()
        return (self.root.expanduser() if self.root else path if path.is_dir() else path.parent).absolute()


def open_table(source: BuildSource) -> SourceTable:
    """The table that `source` names.

    Raises:
        UserError: it is not there, of no known kind, or its columns cannot be found.
    """
    path = local_path(source.path, "SOURCE")
    for where, given in (("--root", source.root), ("--captions", source.captions)):
        if given is not None:
            local_path(given, where)
    try:
        if source.captions is not None:
            if not path.is_dir():
                raise UserError(f"--captions goes with a folder of images, but {path} is none")
            return _read([source.captions.expanduser()], source.columns)
        if path.is_dir():
            parquet = sorted(file for file in path.iterdir() if file.suffix in _PARQUET)
            if parquet and not source.class_folders and not _are_of_img2dataset(parquet):
                return ParquetTable(parquet, source.columns)
            return read_folder(path, source.class_folders)
        if source.class_folders:
            raise UserError(f"--class-folders goes with a folder of images, but {path} is none")
        return _read(_matches(path) or [path], source.columns)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def _matches(path: Path) -> list[Path]:
    """The files that a path with `*`, `?` or `[...]` means; a folder that is there is no pattern, whatever its name."""
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    if path.parent.is_dir():
        return sorted(path.parent / name for name in glob.glob(path.name, root_dir=path.parent))
    return sorted(map(Path, glob.glob(str(path))))


def _are_of_img2dataset(parquet: list[Path]) -> bool:
    """Whether the tables only tell of the images in folders of their names, which img2dataset wrote as files."""
    return all(file.with_suffix("").is_dir() for file in parquet)


def _read(files: list[Path], column_options: ColumnOptions) -> SourceTable:
    path = files[0]
    if not path.is_file():
        raise UserError(f"{path}: there is no such file ({_around(path)})")
    suffix = path.suffix.lower()
    if suffix in _PARQUET:
        return ParquetTable(files, column_options)
    if len(files) > 1:
        raise UserError(f"{path.parent}: {len(files)} files are named; only Parquet files make one table together")
    if suffix in _DELIMITED:
        return read_delimited(path, column_options)
    if suffix in _LINES:
        return JsonLinesTable(path, column_options)
    if suffix == ".json":
        return read_json(path, column_options)
    known = ", ".join((*_DELIMITED, *_PARQUET, *_LINES, ".json"))
    raise UserError(f"{path}: {suffix or 'a file without suffix'} is no kind of table that is known ({known})")


def _around(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()])
