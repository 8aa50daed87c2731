"""The contracts of what an objective is made of: terms on pairs, terms on parts of a batch, providers of negatives."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.batch import Batch, BatchPart
from vlm.config import Config
from vlm.objectives.local_part import LocalPart
from vlm.objectives.pairs import ExtraNegatives
from vlm.objectives.state import RunFacts, TermState
from vlm.objectives.step import Between, PairStep
from vlm.outputs import PAIR


@dataclass(frozen=True)
class Needs:
    """The outputs that a term or provider reads in a step, by name: the model's, the teacher's, and all ranks' rows.

    An output of a part that the batch does not bring (`captions`) is not made; `batch_parts` are those without which
    there is nothing to compute.
    """

    outputs: frozenset[str] = PAIR
    teacher_outputs: frozenset[str] = frozenset()
    gathered: frozenset[str] = frozenset()
    batch_parts: frozenset[str] = frozenset()

    def __or__(self, other: "Needs") -> "Needs":
        """Both needs together."""
        return Needs(
            self.outputs | other.outputs,
            self.teacher_outputs | other.teacher_outputs,
            self.gathered | other.gathered,
            self.batch_parts | other.batch_parts,
        )


class Term(Config):
    """One summand of the objective; its fields are its options in a recipe.

    A term's value is a mean over the global batch: over its N pairs, tokens, regions, or whatever it counts. A rank
    returns world_size / N times the sum over its own rows, so that the mean of these numbers over ranks is the value,
    and the mean that the engine takes of the parameters' gradients is the gradient of that value as one process
    computes it on the whole batch.
    """

    weight: float = Field(
        default=1.0, ge=0, le=1e6, description="factor of this term in the objective; 0 leaves it out"
    )

    def needs(self) -> Needs:
        """The outputs and parts that the term reads."""
        return Needs()

    def start(self, facts: RunFacts) -> TermState | None:  # noqa: ARG002
        """The state with which a run begins; None for a term without memory."""
        return None

    def provides(self) -> "Mapping[str, Provider]":
        """Providers that come with the term, for other terms, by names of its own."""
        return {}

    def parameters(self, facts: RunFacts) -> dict[str, Tensor]:  # noqa: ARG002
        """First values of what the term learns beside the model, by name; they train with the model."""
        return {}


class PairTerm(Term):
    """A term that compares pairs: evaluated once a step on all rows of all ranks, however they were embedded.

    Formulas write x for the first and y for the second of the two kinds of rows that it is `between`.
    """

    takes_providers: ClassVar[bool] = False  # extra negatives and harder positives may be attached
    picks_pairs: ClassVar[bool] = False  # by their similarity: rounded products may pick others

    between: Between = Field(
        default=("image", "text"),
        description="the two outputs that are compared, one row a sample; options on images and texts are of the "
        "first and the second",
    )

    def needs(self) -> Needs:
        """The outputs and parts that the term reads."""
        return Needs(outputs=frozenset(self.between))

    @abstractmethod
    def __call__(self, step: PairStep) -> Float[Tensor, ""]:
        """This rank's part of the term's mean, unweighted. Its state and parameters come with the step. Collective."""


class LocalTerm(Term):
    """A term that compares nothing across samples (captioning, grounding, masked words): a sum over units of its own.

    It is evaluated on each micro-batch, with that one's graph. Its value is the sum over all units of the global batch
    divided by their number, whatever micro-batch or rank they are in.
    """

    def adds(self, batch: Batch, seed: int) -> Mapping[str, BatchPart]:  # noqa: ARG002
        """Parts for the model beside those of the data, such as what is drawn: of this rank's rows of a global batch.

        Draws are keyed by seed, step and sample (`vlm.objectives.counter_rng`), so that no split changes them.
        """
        return {}

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """The units (tokens, regions, samples) of this rank's rows of a global batch."""

    @abstractmethod
    def __call__(self, part: LocalPart) -> Float[Tensor, ""]:
        """The sum over the units of a micro-batch, unweighted. State is told part by part. Not collective."""


class Provider(Config):
    """Extra negatives or harder positives for the terms that it is attached to; its fields are its options."""

    between: Between = Field(
        default=("image", "text"), description="the two outputs that it serves: terms between others take it not"
    )
    attach_to: tuple[str, ...] | None = Field(default=None, description="terms by name; null: all that take providers")
    start_step: int = Field(default=0, ge=0, le=10**12, description="steps before it joins in")

    def needs(self) -> Needs:
        """The outputs and parts that the provider reads."""
        return Needs(outputs=frozenset(self.between))

    def start(self, facts: RunFacts) -> TermState | None:  # noqa: ARG002
        """The state with which a run begins; None for a provider without memory."""
        return None

    def negatives(self, step: PairStep) -> ExtraNegatives | None:  # noqa: ARG002
        """Extra negatives for this step's pairs; its state comes with it. Collective."""
        return None

    def positive_spread(self, step: PairStep) -> Float[Tensor, " rows"] | None:  # noqa: ARG002
        """By how much each pair is extrapolated apart (1: not at all); see `Pairs.positive_similarity`."""
        return None


def needs_of(configs: "Iterable[Term | Provider]") -> Needs:
    """The needs of several terms and providers together."""
    total = Needs(outputs=frozenset())
    for config in configs:
        total = total | config.needs()
    return total
