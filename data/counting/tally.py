"""How many samples and captions there were, by number and by what became of them."""

from collections.abc import Iterable, Iterator

Tally = dict[str, dict[str, int]]
"""Counts by the word of a number ("" for what has none), then by name."""

CAPTIONS = "captions"
"""Captions with exactly one spelled number, this one."""
SAMPLES = "samples"
"""Samples that were looked at; under a number, those whose captions agree on it."""
UNKNOWN = "unknown"
"""Of these, those that the detections say nothing of."""


def add(tally: Tally, word: str, name: str, count: int = 1) -> None:
    """Count `count` more."""
    names = tally.setdefault(word, {})
    names[name] = names.get(name, 0) + count


def entries(tally: Tally) -> Iterator[tuple[str, str, int]]:
    """Every count, with its word and name."""
    return ((word, name, count) for word, names in tally.items() for name, count in names.items())


def merged(tallies: Iterable[Tally]) -> Tally:
    """The sum of all."""
    total: Tally = {}
    for tally in tallies:
        for word, name, count in entries(tally):
            add(total, word, name, count)
    return total
