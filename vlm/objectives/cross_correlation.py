"""Cross-correlation of the two modalities' dimensions, driven to the identity."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.term import PairTerm
from vlm.similarity.collectives import RowGroup
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

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        image, text = pairs.image, pairs.text
        if self.standardize:
            image, text = _standardized(image, pairs.ranks), _standardized(text, pairs.ranks)
        correlation = pairs.ranks.sum(gram(image, text)) / pairs.ranks.num_rows
        diagonal = correlation.diagonal()
        rest = correlation.square().sum() - diagonal.square().sum()
        value = self.factor * ((diagonal - 1).square().sum() + self.off_diagonal * rest)
        return pairs.share_of_group(value.to(image.dtype))


def _standardized(rows: Float[Tensor, "rows dim"], ranks: RowGroup) -> Float[Tensor, "rows dim"]:
    """Each dimension with mean 0 and variance 1 over all ranks' rows."""
    centred = rows - ranks.sum(rows.sum(0)) / ranks.num_rows
    variance = ranks.sum(centred.square().sum(0)) / ranks.num_rows
    return centred * torch.rsqrt(variance + _EPSILON)
