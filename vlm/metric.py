"""What a figure means, and tables of figures: for evaluators, and for reports, which need no model and no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower"]
Unit = Literal["fraction", "count", "number"]
Prominence = Literal["headline", "usual", "detail"]


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluator: its name in metrics.jsonl, and all that a reader needs to judge it.

    Attributes:
        name: as in `eval/EVALUATION/NAME`; without a slash.
        better: which values are better; None where neither is in itself.
        description: a sentence on what is measured, for a reader who does not know the name.
        unit: a "fraction" lies in [0, 1] and is shown in percent, a "count" is how much was evaluated, and no result.
        label: the name in words, within its group; by default the name itself, its underscores as spaces.
        group: the words for what several metrics are of (a direction of retrieval): they share a row and a chart.
        prominence: a "headline" stands at the top of a report, a "detail" is left out where runs are compared by chart.
    """

    name: str
    better: Better | None = None
    description: str = ""
    unit: Unit = "number"
    label: str = ""
    group: str = ""
    prominence: Prominence = "usual"

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"a metric has a name without a slash; found {self.name!r}")
        if not self.label:
            object.__setattr__(self, "label", self.name.replace("_", " "))

    @property
    def title(self) -> str:
        """The name in words, with its group's."""
        return f"{self.group} {self.label}".strip()


@dataclass(frozen=True)
class FigureTable:
    """Figures by row and column, which a run writes with the others and its report shows.

    Attributes:
        title: the words above it.
        columns: the names of its columns.
        rows: the figures of each row, one a column.
        unit: that of all of them, or of each column.
        note: a sentence on how to read it.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    unit: Unit | Sequence[Unit] = "number"
    note: str = ""
