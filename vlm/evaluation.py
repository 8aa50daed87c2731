"""Evaluators as a trainer and a report see them: what they measure, what their figures mean, and what they return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from vlm.batch import Skip
from vlm.checkpoint.data_record import DataRecord
from vlm.distributed.world import World

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


@runtime_checkable
class Artifact(Protocol):
    """Files that an evaluation can write beside its figures, made only when somebody wants them."""

    def write(self, folder: Path) -> Sequence[Path]:
        """Write into `folder`, which is made where it is missing, and return the paths. On one rank alone."""


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


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluator: figures by the names of its metrics, and what was made on the way to them.

    Attributes:
        figures: the same on every rank.
        curves: further numbers, by chart and line; `vlm eval --json` writes them beside the figures.
        examples: what a run writes into `examples/EVALUATION` at its end (see `eval.examples`, whose files its report
            shows).
        plots: what `vlm eval --plots` draws.
        tables: figures of several rows and columns, by a name like a metric's.
    """

    figures: dict[str, float]
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    examples: Artifact | None = None
    plots: Artifact | None = None
    tables: Mapping[str, FigureTable] = field(default_factory=dict)


@runtime_checkable
class Evaluator(Protocol):
    """A measurement of models: all ranks share the work, and the figures depend neither on their number nor on batches.

    A class that derives from it has no notices, no sets and no skipped samples, and measures any model, unless it says
    otherwise.
    """

    @property
    def metrics(self) -> Sequence[Metric]:
        """All that `run` may measure."""

    @property
    def notices(self) -> tuple[str, ...]:
        """Lines on the data that a reader of the figures should know."""
        return ()

    @property
    def records(self) -> Mapping[str, DataRecord]:
        """The sets that are measured on, told from others wherever they lie, by the configuration's keys."""
        return {}

    @property
    def skipped(self) -> tuple[Skip, ...]:
        """The samples that were of no use so far, as far as this rank knows."""
        return ()

    def require(self, model: Any) -> None:  # noqa: ARG002
        """Raise UserError for a model that cannot be measured, before anything else is done with it."""
        return

    def run(self, model: Any, world: World) -> Evaluation:
        """Measure `model`, which has the methods of `eval.encoder.Encoder`. Collective."""
