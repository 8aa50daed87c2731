"""A row of a table as the parts of one sample: where its image lies, its captions, and the columns that go along."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.samples.bad_sample import BadSampleError


@dataclass(frozen=True)
class ColumnRoles:
    """The columns of a table that hold image, captions and label."""

    image: str
    captions: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True)
class Blob:
    """Image bytes that were set aside from a table: where they lie, and the name that the table gives them."""

    file: str
    offset: int
    size: int
    name: str = ""


@dataclass(frozen=True)
class TextFile:
    """Captions in a file of their own, one a line."""

    path: str


# A row as its table gives it, or the reason why it cannot be used.
Row = Mapping[str, Any] | BadSampleError


@dataclass(frozen=True)
class Entry:
    """One sample to be made; `row` is its (first) row in the table, counted from 0."""

    row: int
    key: str
    image: Any
    captions: tuple[Any, ...]
    label: Any
    fields: Mapping[str, Any]
    problem: str | None = None

    @property
    def path(self) -> str:
        """The name that a message gives its image."""
        return self.image.name if isinstance(self.image, Blob) else str(self.image or "")


def entry_of(row: int, key: str, rows: Sequence[Row], columns: ColumnRoles) -> Entry:
    """The sample that the `rows` of one image make, the first of them being number `row`.

    Captions are all those of all rows, in order; any other column whose values differ becomes the list of them.
    """
    usable = [values for values in rows if not isinstance(values, BadSampleError)]
    if not usable:
        return Entry(row, key, None, (), None, {}, str(rows[0]))
    captions = tuple(caption for values in usable for name in columns.captions for caption in _listed(values.get(name)))
    role_columns = {columns.image, columns.label}
    if len(columns.captions) == 1:  # of several, each is also kept by its name: a policy may prefer one of them
        role_columns.add(columns.captions[0])
    names = dict.fromkeys(name for values in usable for name in values if name not in role_columns)
    fields = {name: _shared([values.get(name) for values in usable]) for name in names}
    label = usable[0].get(columns.label) if columns.label else None
    return Entry(row, key, usable[0].get(columns.image), captions, label, fields)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _shared(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values
