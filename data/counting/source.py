"""Step 2: where the counts of a sample's detected objects come from, and whether they agree with a number."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.check.samples import StoredSample
from data.counting.entries import BadEntryError, Counts, counts_of_classes
from data.counting.named import NamedNumber, Outcome
from vlm.errors import nearest

Seen = Counts | dict[str, int] | str | None
"""The counts of a candidate, by class or not: None where nothing is known of it, a reason where it cannot be used."""


@dataclass(frozen=True)
class Candidate:
    """A sample whose captions name one number, and the number of its entry among a file's detections."""

    sample: StoredSample
    fields: dict[str, Any]
    captions: tuple[str, ...]
    named: NamedNumber
    entry: int | None = None


class CountSource(ABC):
    """The counts of candidates; so many of a shard's are asked for `together` (None: all of them).

    Where `looks`, they cost much, and are kept: those of a source that looks at pictures are by class.
    """

    together: int | None = None
    looks: bool = False

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """All that the counts depend on, for a folder's journal and the report."""

    def entry(self, _key: str, _fields: Mapping[str, Any]) -> int | None:
        """The number of a sample's entry, where detections are a list; None for a sample that it does not name."""
        return None

    @property
    def names(self) -> Sequence[str]:
        """What the entries of a list are of, in its order; nothing where there is no list."""
        return ()

    @abstractmethod
    def counts(self, candidates: Sequence[Candidate]) -> Sequence[Seen]:
        """The counts of each candidate."""

    @abstractmethod
    def nothing_known(self, key: str, fields: Mapping[str, Any]) -> str:
        """A line for detections that know no sample at all, of which one has this key and these fields."""


class CaptionsOnly(CountSource):
    """No detections: every number is believed (the "naive filtering" of the paper's ablation)."""

    def plan(self) -> dict[str, Any]:
        """Only that."""
        return {"detections": "none"}

    def counts(self, candidates: Sequence[Candidate]) -> Sequence[Seen]:
        """As many as the captions say."""
        return [(one.named.value,) for one in candidates]

    def nothing_known(self, key: str, fields: Mapping[str, Any]) -> str:
        """Never asked for: whatever the captions say is known."""
        raise NotImplementedError


@dataclass(frozen=True)
class FieldCounts(CountSource):
    """Counts in a field of each sample's own json: an object of class names and numbers."""

    field: str

    def plan(self) -> dict[str, Any]:
        """The field."""
        return {"detections": f"json:{self.field}"}

    def counts(self, candidates: Sequence[Candidate]) -> Sequence[Seen]:
        """What stands in the field."""
        return [self._of(candidate.fields.get(self.field)) for candidate in candidates]

    def nothing_known(self, key: str, fields: Mapping[str, Any]) -> str:
        """The fields that there are."""
        return f"--detections json:{self.field}: no sample has this field (sample {key}: {nearest(self.field, fields)})"

    def _of(self, stored: Any) -> Seen:
        if stored is None:
            return None
        try:
            return counts_of_classes(stored)
        except BadEntryError as error:
            return f"its json has a field {self.field} that counts nothing: {error}"


def verdict(number: int, counts: Counts | None) -> Outcome:
    """Whether the class with the most objects has as many as the captions say (the paper's rule), or why not."""
    if not counts:
        return Outcome.NO_DETECTIONS
    if counts[0] == number:
        return Outcome.KEPT
    return Outcome.CLASS_DIFFERS if number in counts else Outcome.COUNT_DIFFERS
