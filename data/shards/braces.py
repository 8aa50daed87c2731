"""Brace patterns, `{000..099}` and `{a,b}`, as bash has them; counted before they are written out."""

import re
from collections.abc import Iterator

import braceexpand

MOST_NAMES = 1_000_000
_MOST_NESTED = 50
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
_LONG_RANGE = re.compile(r"-?\d+\.\.-?\d+(?:\.\.-?\d+)?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d{1,18}))?")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern means, in order. Raises ValueError where braces do not close, or mean too many names."""
    if "{" not in pattern and "}" not in pattern:
        return [pattern]
    if count_braces(pattern) > MOST_NAMES:
        raise ValueError(f"it means more than {MOST_NAMES:,} names")
    return list(braceexpand.braceexpand(pattern))


def count_braces(pattern: str) -> int:
    """The number of names in a pattern: the product of its groups, each a range or the sum of its alternatives."""
    total = 1
    for group in _groups(pattern):
        if (span := _RANGE.fullmatch(group)) is not None:
            first, last, step = int(span[1]), int(span[2]), int(span[3] or 1) or 1
            total *= abs(last - first) // step + 1
        elif _LONG_RANGE.fullmatch(group):
            total *= MOST_NAMES + 1
        elif (span := _LETTERS.fullmatch(group)) is not None:
            first, last = (braceexpand.alphabet.index(letter) for letter in span.groups()[:2])
            total *= abs(last - first) // (int(span[3] or 1) or 1) + 1
        else:
            total *= sum(count_braces(alternative) for alternative in _split(group))
    return total


def _groups(pattern: str) -> Iterator[str]:
    """The text in each outermost pair of braces."""
    start, depth = 0, 0
    for place, sign in _signs(pattern):
        if sign == "{":
            depth += 1
            if depth > _MOST_NESTED:
                raise ValueError(f"its braces are nested more than {_MOST_NESTED} deep")
            start = place + 1 if depth == 1 else start
        elif sign == "}":
            depth -= 1
            if depth == 0:
                yield pattern[start:place]
    if depth:
        raise ValueError("its braces do not close")


def _split(group: str) -> Iterator[str]:
    start, depth = 0, 0
    for place, sign in _signs(group):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if sign == "," and depth == 0:
            yield group[start:place]
            start = place + 1
    yield group[start:]


def _signs(text: str) -> Iterator[tuple[int, str]]:
    """The places of braces and commas that no backslash protects."""
    for match in re.finditer(r"\\.|[{},]", text, re.DOTALL):
        if len(match[0]) == 1:
            yield match.start(), match[0]
