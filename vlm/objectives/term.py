"""The contract of a term of the objective."""

from abc import abstractmethod

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.batch import Batch
from vlm.config import Config
from vlm.encoded import Encoded
from vlm.world import World


class Term(Config):
    """One summand of the objective; its fields are its options in a recipe.

    A term's value is its mean over the global batch of N pairs. A rank returns its *share*: world_size / N times the
    sum over its own rows, so that the mean of the shares over ranks is the value, and the mean that the engine takes of
    the parameters' gradients is the gradient of that value as one process computes it on the whole batch.
    """

    weight: float = Field(default=1.0, description="factor of this term in the objective; 0 leaves it out")

    @abstractmethod
    def __call__(self, encoded: Encoded, batch: Batch, world: World) -> Float[Tensor, ""]:
        """This rank's share of the term, unweighted."""
