"""Rows of delimited text with quotes, read so that a quote left open costs its own row and none after it."""

import csv
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

_MOST_LINES = 1_000  # of one row


class Cells(NamedTuple):
    """One row: its cells, or (then with those of its first line) what is wrong with it."""

    values: list[str]
    problem: str | None = None


class _OpenError(Exception):
    """A quote that nothing closes."""


def quoted_rows(lines: Iterable[str], separator: str, is_row: Callable[[list[str]], bool]) -> Iterator[Cells]:
    """The rows of `lines`, which end as they do in the file; quotes mean what they mean to Python's csv and to pandas.

    A quoted text may go over several lines, unless one of these `is_row` by itself, or the quote that would close it
    stands in the middle of a cell: then it was left open, and the next row begins on the next line. Empty lines are
    no rows.
    """
    pending: deque[str] = deque()
    rest = iter(lines)
    while (line := _next(pending, rest)) is not None:
        if not line.strip("\r\n"):
            continue
        if '"' not in line:
            yield Cells(line.rstrip("\r\n").split(separator))
            continue
        row_lines = [line]
        try:
            yield Cells(_full_row(row_lines, lambda: _next(pending, rest), separator, is_row))
        except _OpenError:
            pending.extendleft(reversed(row_lines[1:]))
            yield Cells(_lenient(line, separator), "a quote of the row is left open: double it, or close it")
        except csv.Error as error:
            pending.extendleft(reversed(row_lines[1:]))
            yield Cells([], f"the row cannot be read ({error})")


def _next(pending: deque[str], rest: Iterator[str]) -> str | None:
    return pending.popleft() if pending else next(rest, None)


def _full_row(
    row_lines: list[str], more: Callable[[], str | None], separator: str, is_row: Callable[[list[str]], bool]
) -> list[str]:
    """The cells of the row that begins with the line in `row_lines`, to which each further line is added that was read.

    Raises:
        _OpenError: its quote is left open.
    """
    while True:
        if row_lines[1:] == [] or '"' in row_lines[-1]:
            try:
                return next(csv.reader(row_lines, delimiter=separator, strict=True))
            except csv.Error as error:
                if "unexpected end of data" not in str(error):
                    if len(row_lines) > 1:
                        raise _OpenError from error
                    return _lenient(row_lines[0], separator)
        following = more()
        if following is None or len(row_lines) == _MOST_LINES:
            row_lines += [] if following is None else [following]
            raise _OpenError
        row_lines.append(following)
        if is_row(_lenient(following, separator)):
            raise _OpenError


def _lenient(line: str, separator: str) -> list[str]:
    """The cells of one line, whatever its quotes."""
    return next(csv.reader([line], delimiter=separator), [])
