"""Image folders with a text file beside each image."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from data.convert.entry import ColumnRoles, TextFile
from data.convert.table import ListTable
from vlm.errors import UserError

_HIDDEN = ("__MACOSX",)  # what Macs add to zip files
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_folder(folder: Path, class_folders: bool) -> ListTable:
    """All images below `folder`, by name; `a/b.txt` holds the captions of `a/b.jpg`, one a line.

    With `class_folders` the folder that stands first in an image's path is its label, as torchvision's ImageFolder has
    it. What is hidden is passed over: a name that begins with a dot (Macs write `._b.jpg` beside `b.jpg`).

    Raises:
        UserError: there is no image, or no image has captions, or none a class.
    """
    digest = hashlib.sha256()
    images: list[str] = []
    texts: set[str] = set()
    for name, size in sorted(_files(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in _SUFFIXES:
            images.append(name)
        elif suffix == ".txt":
            texts.add(stem)
        else:
            continue
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    if not images:
        raise UserError(f"{folder}: no image ({', '.join(suffix[1:] for suffix in _SUFFIXES)}) in this folder")
    rows: list[dict[str, object]] = [
        {"file_name": name, "caption": _text(folder, os.path.splitext(name)[0], texts)} for name in images
    ]
    if class_folders:
        digest.update(b"class folders")
        rows = [{**row, "class": _class_of(str(row["file_name"]))} for row in rows]
        if all(row["class"] is None for row in rows):
            raise UserError(f"--class-folders: {folder} has images, but none of them in a folder below it")
        return ListTable(rows, ColumnRoles("file_name", ("caption",), "class"), digest.hexdigest())
    if all(row["caption"] is None for row in rows):
        raise UserError(
            f"{folder}: no image has a .txt of its name beside it; name a captions file with --captions, or say "
            "--class-folders if each folder is a class"
        )
    return ListTable(rows, ColumnRoles("file_name", ("caption",)), digest.hexdigest())


def _class_of(name: str) -> str | None:
    first, inside, _ = name.partition(os.sep)
    return first if inside else None


def _text(folder: Path, stem: str, texts: set[str]) -> TextFile | None:
    return TextFile(str(folder / f"{stem}.txt")) if stem in texts else None


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """All files below a folder by name, with their sizes; a link to a folder that it lies in leads to nothing new."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        below, around = waiting.pop()
        state = os.stat(folder / below)
        inode = (state.st_dev, state.st_ino)
        if inode in around:
            continue
        with os.scandir(folder / below) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _HIDDEN:
                    continue
                name = os.path.join(below, entry.name)
                if entry.is_dir():
                    waiting.append((name, around | {inode}))
                elif entry.is_file():
                    yield name, entry.stat().st_size
