"""Finding the columns of a table that hold image, captions and label."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.convert.entry import ColumnRoles
from vlm.errors import UserError, nearest

# In order of preference; compared in lower case with "_" for blanks and dashes. open_clip's own CSVs: filepath, title.
IMAGE_NAMES = ("image", "filepath", "path", "filename", "image_path", "jpg", "file_name", "image_name", "file", "img")
CAPTION_NAMES = ("caption", "captions", "title", "text", "alt_text", "comment", "sentence", "sentences", "alt")
LABEL_NAMES = ("label", "cls")
_ADDRESS_NAMES = ("url", "image_url", "image_link", "link")


@dataclass(frozen=True)
class ColumnOptions:
    """The columns that a user names; None or nothing leaves them to be found by their usual names."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    label: str | None = None


def find_columns(names: Sequence[str], column_options: ColumnOptions, where: str) -> ColumnRoles:
    """The columns that are asked for, or else those with a usual name; a label, or captions beside it, are optional.

    Raises:
        UserError: a column is not there; it names the columns found, and the nearest.
    """
    image = _named(names, column_options.image, "--image-column", where) or _usual(names, IMAGE_NAMES)
    if image is None:
        raise UserError(f"{where}: no column of images {_choices(names, IMAGE_NAMES, '--image-column')}{_hint(names)}")
    label = _named(names, column_options.label, "--label-column", where)
    captions = tuple(_named(names, name, "--caption-column", where) or name for name in column_options.captions)
    if not captions:
        usual = _usual([name for name in names if name not in (image, label)], CAPTION_NAMES)
        captions = () if usual is None else (usual,)
    if label is None:
        label = _usual([name for name in names if name not in (image, *captions)], LABEL_NAMES)
    if not captions and label is None:
        choices = _choices(names, CAPTION_NAMES, "--caption-column")
        raise UserError(f"{where}: no column of captions {choices}, or a column of labels with --label-column")
    return ColumnRoles(image, captions, label)


def is_usual(name: str) -> bool:
    """Whether a cell of a header names an image or a caption in one of the usual ways."""
    return _normal(name) in IMAGE_NAMES + CAPTION_NAMES


def _named(names: Sequence[str], name: str | None, option: str, where: str) -> str | None:
    if name is not None and name not in names:
        raise UserError(f"{option} {name}: {where} has no such column, only {_shown(names)} ({nearest(name, names)})")
    return name


def _usual(names: Sequence[str], usual: Sequence[str]) -> str | None:
    by_normal_name = {_normal(name): name for name in reversed(names)}
    return next((by_normal_name[name] for name in usual if name in by_normal_name), None)


def _normal(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _choices(names: Sequence[str], usual: Sequence[str], option: str) -> str:
    return f"({', '.join(usual[:6])}, ...) among {_shown(names)} ({nearest(usual[0], names)}); name one with {option}"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"


def _hint(names: Sequence[str]) -> str:
    address = _usual(names, _ADDRESS_NAMES)
    if address is None:
        return ""
    return (
        f"; {address} holds addresses, which are not fetched: download the images first, for instance with img2dataset"
    )
