"""The report of a counting set: for each number how many samples had it, how many were kept, and why the others not."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from data.counterfactuals.numbers import WORDS
from data.counting.choice import Choice
from data.counting.named import Outcome
from data.counting.tally import CAPTIONS, SAMPLES
from vlm.paths import write_output

_MOST_NAMES: Final = 10
WITHOUT_NUMBER: Final = (Outcome.NO_NUMBER, Outcome.SEVERAL_NUMBERS, Outcome.CAPTIONS_DISAGREE, Outcome.UNUSABLE)
"""What samples without one number are left out for."""
OF_NUMBERS: Final[tuple[str, ...]] = (
    CAPTIONS,
    SAMPLES,
    Outcome.NO_DETECTIONS,
    Outcome.COUNT_DIFFERS,
    Outcome.CLASS_DIFFERS,
    Outcome.UNUSABLE,
    Outcome.SHARED_KEY,
    Outcome.BALANCE,
    Outcome.KEPT,
)
"""The columns under each number: captions with it alone, samples that agree on it, and what became of these."""


@dataclass(frozen=True)
class CountingReport:
    """The figures of a counting set.

    `options` are those that it depends on; `kept_at_most` is how many samples of each number from 2 to 6 were kept,
    None where all were. `without_number` says why samples had no one number, `numbers` has the columns `OF_NUMBERS` by
    number. `unknown_names` entries of the detections name no sample; the first ones are listed.
    """

    options: dict[str, Any]
    shards: int
    shards_written: int
    samples: int
    kept: int
    kept_at_most: int | None
    without_number: dict[str, int]
    numbers: dict[str, dict[str, int]]
    unknown_names: int
    first_unknown_names: tuple[str, ...]

    @classmethod
    def of(cls, choice: Choice, options: dict[str, Any], names: Sequence[str], num_shards: int) -> "CountingReport":
        """The report of a choice; `names` are what the detections' entries name."""
        without = choice.tally.get("", {})
        numbers = {
            str(number): {column: choice.tally.get(word, {}).get(column, 0) for column in map(str, OF_NUMBERS)}
            for number, word in WORDS.items()
        }
        return cls(
            options=options,
            shards=num_shards,
            shards_written=len(choice.kept),
            samples=without.get(SAMPLES, 0),
            kept=sum(map(len, choice.kept.values())),
            kept_at_most=choice.most,
            without_number={str(outcome): without.get(outcome, 0) for outcome in WITHOUT_NUMBER},
            numbers=numbers,
            unknown_names=len(choice.unknown),
            first_unknown_names=tuple(names[entry] for entry in choice.unknown[:_MOST_NAMES]),
        )

    def write(self, path: Path) -> None:
        """Write the JSON file, whole or not at all. Raises UserError where it cannot be written."""
        write_output(path, json.dumps(asdict(self), indent=1) + "\n", "figures of the counting set")
