"""Evaluators as a trainer and a report see them: what they measure, what their figures mean, and what they return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vlm.checkpoint.data_record import DataRecord
from vlm.distributed.world import World
from vlm.metric import FigureTable as FigureTable
from vlm.metric import Metric as Metric
from vlm.skip import Skip


@runtime_checkable
class Artifact(Protocol):
    """Files that an evaluation can write beside its figures, made only when somebody wants them."""

    def write(self, folder: Path) -> Sequence[Path]:
        """Write into `folder`, which is made where it is missing, and return the paths. On one rank alone."""


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
