"""Cross-correlation of the two modalities' dimensions, driven to the identity."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.distributed.row_group import RowGroup
from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import PairTerm
from vlm.similarity.gram import gram

_EPSILON = 1e-5  # that of batch normalisation


@TERMS.register("cross_correlation")
class CrossCorrelation(PairTerm):
    """Barlow Twins between images and texts: BarLIP of CLIP-rocket (Fini et al., 2023; Zbontar et al., 2021).

    value = s [ sum_k (C_kk - 1)^2 + l sum_{k != m} C_km^2 ],  C = X^T Y / N

    with s, l the fields `factor`, `off_diagonal`, and each dimension of X and Y standardised over the global batch
    (`standardize: false`: as it is). C is a sum over ranks: D x D numbers, in float64 inside.
    """

    factor: float = Field(default=0.025, gt=0, le=1e6, description="factor of the whole")
    off_diagonal: float = Field(default=5e-3, ge=0, le=1e6, description="factor of the entries off the diagonal")
    standardize: bool = Field(default=True, description="mean 0 and variance 1 of each dimension over the global batch")

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        return cross_correlation(
            step.pairs, factor=self.factor, off_diagonal=self.off_diagonal, standardize=self.standardize
        )


def cross_correlation(
    pairs: Pairs, *, factor: float = 0.025, off_diagonal: float = 5e-3, standardize: bool = True
) -> Float[Tensor, ""]:
    """The loss of `CrossCorrelation`."""
    x, y = (_standardized(rows, pairs.ranks) if standardize else rows for rows in (pairs.x, pairs.y))
    correlation = pairs.ranks.sum(gram(x, y)) / max(pairs.ranks.num_rows, 1)
    diagonal = correlation.diagonal()
    rest = correlation.square().sum() - diagonal.square().sum()
    value = factor * ((diagonal - 1).square().sum() + off_diagonal * rest)
    return pairs.samples.mean_over_groups(value.to(pairs.x.dtype))


def _standardized(rows: Float[Tensor, "rows dim"], ranks: RowGroup) -> Float[Tensor, "rows dim"]:
    """Each dimension with mean 0 and variance 1 over all ranks' rows."""
    centred = rows - ranks.sum(rows.sum(0)) / ranks.num_rows
    variance = ranks.sum(centred.square().sum(0)) / ranks.num_rows
    return centred * torch.rsqrt(variance + _EPSILON)
