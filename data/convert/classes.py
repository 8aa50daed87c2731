"""Labels of a table as class numbers, and the names of the classes."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from data.convert.entry import ColumnRoles
from data.convert.table import SourceTable
from data.samples.bad_sample import BadSampleError
from data.samples.class_names import read_class_file
from data.samples.labels import class_number
from vlm.errors import UserError, nearest
from vlm.paths import local_path

CLASSES: Final = "classes.json"
_MOST = 1_000_000


@dataclass(frozen=True)
class Classes:
    """The names of the classes, by number, and whether the table's labels are names or numbers."""

    names: tuple[str, ...]
    labels_are_names: bool

    def number(self, label: Any) -> Any:
        """The class number of a label; None where there is no label."""
        if _is_none(label):
            return None
        return self._numbers[_name(label)] if self.labels_are_names else label

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def find_classes(
    table: SourceTable, columns: ColumnRoles, is_required: bool, file: str | None
) -> tuple[ColumnRoles, Classes | None]:
    """The columns, without a label that is none, and the classes where their names are known.

    Labels are numbers, or names, which are numbered in their sorted order, or as the `file` of names lists them. A
    column that nobody asked for and that holds names is no label where there are captions.

    Raises:
        UserError: the label asked for holds neither, or a class that `file` does not have.
    """
    if columns.label is None:
        if file is not None:
            raise UserError("--classes: there are no labels; name their column with --label-column")
        return columns, None
    option = f"--label-column {columns.label}"
    labels_in_table = _distinct(table.labels(), option)
    known = None if file is None else read_class_file(local_path(file, "--classes"), f"--classes {file}").names
    others = [label for label in labels_in_table if not _is_number(label)]
    if not others:
        names = known or table.class_names
        if names is not None and (most := max(map(class_number, labels_in_table), default=0)) >= len(names):
            raise UserError(f"{option}: holds class {most}, but there are {len(names)} class names")
        return columns, None if names is None else Classes(names, labels_are_names=False)
    if not is_required and known is None and columns.captions:
        return replace(columns, label=None), None  # a column that is called so, and is something else
    if len(others) < len(labels_in_table):
        raise UserError(f"{option}: holds numbers and names, such as {others[0]!r:.60}; give one or the other")
    labels = sorted({_name(label) for label in labels_in_table})
    missing = next((label for label in labels if known is not None and label not in known), None)
    if known is not None and missing is not None:
        raise UserError(f"{option}: holds {missing!r:.60}, which --classes {file} has not ({nearest(missing, known)})")
    return columns, Classes(known or tuple(labels), labels_are_names=True)


def _distinct(labels: Iterable[Any], option: str) -> list[Any]:
    distinct: dict[Any, None] = {}
    for label in labels:
        if _is_none(label):
            continue
        if not isinstance(label, str | int | float):
            raise UserError(f"{option}: a label is a class number or a name, found {label!r:.60}")
        distinct[label] = None
        if len(distinct) > _MOST:
            raise UserError(f"{option}: holds more than {_MOST:,} different labels; is it a label?")
    return list(distinct)


def _is_number(label: Any) -> bool:
    try:
        class_number(label)
    except BadSampleError:
        return False
    return True


def _is_none(label: Any) -> bool:
    """Whether a cell says nothing: null, NaN (what tables have for null in numbers), or blank."""
    return label is None or label != label or (isinstance(label, str) and not label.strip())


def _name(label: Any) -> str:
    return str(label).strip()
