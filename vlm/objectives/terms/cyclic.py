"""Cyclic consistency: the same similarities whichever modality is on which side."""

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import PairTerm
from vlm.similarity.gram import gram


@TERMS.register("cyclic")
class Cyclic(PairTerm):
    """The two consistency terms of CyCLIP (Goel et al., 2022, equations 3 and 4), over all pairs of the global batch.

    value = b/N sum_ij (<x_i, y_j> - <x_j, y_i>)^2 + c/N sum_ij (<x_i, x_j> - <y_i, y_j>)^2

    with b, c the fields `cross_modal`, `in_modal`. Divided by N, not N^2, as in the paper: the value grows with the
    batch. No pair matrix is made: squared Frobenius norms of N x N products are traces of D x D ones (X^T X, Y^T Y and
    X^T Y, summed over ranks), at 6 N D^2 operations. They are float64 inside, for the differences of near traces.
    """

    cross_modal: float = Field(default=0.25, ge=0, le=1e6, description="factor of the cross-modal consistency")
    in_modal: float = Field(default=0.25, ge=0, le=1e6, description="factor of the in-modal consistency")

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        return cyclic(step.pairs, cross_modal=self.cross_modal, in_modal=self.in_modal)


def cyclic(pairs: Pairs, *, cross_modal: float = 0.25, in_modal: float = 0.25) -> Float[Tensor, ""]:
    """The loss of `Cyclic`."""
    x, y = pairs.x, pairs.y
    xx, yy, xy = (pairs.ranks.sum(gram(a, b)) for a, b in ((x, x), (y, y), (x, y)))
    # |XY'|^2 = <X'X, Y'Y>, <XY', YX'> = <X'Y, Y'X>, |XX'|^2 = |X'X|^2, <XX', YY'> = |X'Y|^2
    across = 2 * ((xx * yy).sum() - (xy * xy.T).sum())
    within = xx.square().sum() + yy.square().sum() - 2 * xy.square().sum()
    total = cross_modal * across + in_modal * within
    return pairs.samples.mean_over_groups((total / max(pairs.ranks.num_rows, 1)).to(x.dtype))
