"""Harder pairs by moving features: positives are extrapolated apart, negatives interpolated between samples."""

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vlm.objectives.counter_rng import symmetric_beta, uniforms
from vlm.objectives.pairs import ExtraNegatives
from vlm.objectives.providers.extra_negatives import SharedNegatives
from vlm.objectives.registry import PROVIDERS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, Provider


@PROVIDERS.register("feature_transform")
class FeatureTransform(Provider):
    """Positive extrapolation and negative interpolation (Zhu et al., 2021, sections 4.1 and 4.2).

    A pair x, y with s = <x, y> is compared as if it were farther apart, l - 1 ~ Beta(a, a):

        <l x + (1 - l) y, l y + (1 - l) x> = (2 l^2 - 2 l + 1) s + 2 l (1 - l) <= s

    and beside the batch's negatives n_j stand mu n_j + (1 - mu) n_p(j), p a permutation of the batch that all ranks
    share, mu ~ Beta(b, b) for each column; they carry no gradient, and are no negatives of either of their samples.
    (The paper puts them in the place of a queue's entries, here they join the batch's; its code draws one l and one mu
    a step.) The draws depend on seed, step and sample alone. With a ring, this gathers all columns besides.
    """

    positive: float | None = Field(
        default=2.0, gt=0.5, le=1e6, description="a of the positives' Beta; null: as they are"
    )
    negative: float | None = Field(
        default=1.6, gt=0.5, le=1e6, description="b of the negatives' Beta; null: none added"
    )
    unit_norm: bool = Field(default=False, description="bring interpolated negatives back to unit norm")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between))

    def positive_spread(self, step: PairStep) -> Float[Tensor, " rows"] | None:  # noqa: D102
        if self.positive is None:
            return None
        drawn = symmetric_beta(step.seed, step.step, step.pairs.ids, "feature_transform/l", self.positive)
        return (1 + drawn).to(step.pairs.x)

    def negatives(self, step: PairStep) -> ExtraNegatives | None:  # noqa: D102
        if self.negative is None:
            return None
        pairs, ids = step.pairs, step.pairs.all_ids
        partners = permutation(step.seed, step.step, ids)
        weights = symmetric_beta(step.seed, step.step, ids, "feature_transform/mu", self.negative)
        columns = {
            rows.kind: interpolate(rows.all_values.detach(), partners, weights) for rows in (pairs.x_rows, pairs.y_rows)
        }
        if self.unit_norm:
            columns = {kind: normalize(rows, dim=1) for kind, rows in columns.items()}
        return SharedNegatives(pairs, columns, (ids, ids[partners]))


def permutation(seed: int, step: int, ids: Int64[Tensor, " all"]) -> Int64[Tensor, " all"]:
    """A random permutation of the global batch, the same on all ranks."""
    places = torch.arange(len(ids), device=ids.device)
    return uniforms(seed, step, places, "feature_transform/partners", 1)[:, 0].argsort()


def interpolate(
    rows: Float[Tensor, "all dim"], partners: Int64[Tensor, " all"], weights: Float[Tensor, " all"]
) -> Float[Tensor, "all dim"]:
    """w n_j + (1 - w) n_partner(j) of each row j, with w its weight."""
    return rows[partners].lerp(rows, weights.to(rows)[:, None])
