"""The contracts of what an objective is made of: terms, and providers of negatives."""

from abc import abstractmethod
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.config import Config
from vlm.objectives.pairs import ExtraNegatives, Modality, Pairs
from vlm.objectives.state import RunFacts, TermState


class Term(Config):
    """One summand of the objective; its fields are its options in a recipe.

    A term's value is its mean over the global batch of N pairs. A rank returns its *share*: world_size / N times the
    sum over its own rows (`Pairs.share`), so that the mean of the shares over ranks is the value, and the mean that the
    engine takes of the parameters' gradients is the gradient of that value as one process computes it on the whole
    batch. A term is evaluated once a step on all of the rank's rows, however many micro-batches they were embedded in.
    """

    gathers: ClassVar[frozenset[Modality]] = frozenset()  # embeddings that it wants of all ranks
    needs_teacher: ClassVar[bool] = False  # an average of the weights embeds the batch too
    needs_captions: ClassVar[bool] = False  # all captions of a sample are embedded, not one
    takes_providers: ClassVar[bool] = False  # extra negatives and harder positives may be attached
    # A term that compares no pairs (captioning) runs with each micro-batch's graph and the global normaliser.
    pairwise: ClassVar[bool] = True

    weight: float = Field(
        default=1.0, ge=0, le=1e6, description="factor of this term in the objective; 0 leaves it out"
    )

    def start(self, facts: RunFacts) -> TermState | None:  # noqa: ARG002
        """The state with which a run begins; None for a term without memory."""
        return None

    def parameters(self, facts: RunFacts) -> dict[str, Tensor]:  # noqa: ARG002
        """First values of what the term learns beside the model, by name; they train with the model."""
        return {}

    @abstractmethod
    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:
        """This rank's share of the term, unweighted. Its state and parameters come with the pairs. Collective."""


class Provider(Config):
    """Extra negatives or harder positives for the terms that it is attached to; its fields are its options."""

    gathers: ClassVar[frozenset[Modality]] = frozenset()
    needs_teacher: ClassVar[bool] = False

    attach_to: tuple[str, ...] | None = Field(default=None, description="terms by name; null: all that take providers")
    start_step: int = Field(default=0, ge=0, le=10**12, description="steps before it joins in")

    def start(self, facts: RunFacts) -> TermState | None:  # noqa: ARG002
        """The state with which a run begins; None for a provider without memory."""
        return None

    def negatives(self, pairs: Pairs) -> ExtraNegatives | None:  # noqa: ARG002
        """Extra negatives for this step's pairs; its state comes with them. Collective."""
        return None

    def positive_spread(self, pairs: Pairs) -> Float[Tensor, " rows"] | None:  # noqa: ARG002
        """By how much each pair is extrapolated apart (1: not at all); see `Pairs.positive_similarity`."""
        return None
