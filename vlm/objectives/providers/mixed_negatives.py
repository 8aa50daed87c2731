"""Synthetic negatives: mixtures of the hardest negatives of a query with each other, and with the query."""

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vlm.objectives.counter_rng import uniforms
from vlm.objectives.pairs import ExtraNegatives
from vlm.objectives.providers.extra_negatives import OwnNegatives
from vlm.objectives.registry import PROVIDERS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, Provider
from vlm.similarity.top_k import top_negatives


@PROVIDERS.register("mixed_negatives")
class MixedNegatives(Provider):
    """Hard negative mixing (MoCHi: Kalantidis et al., 2020): harder negatives than the batch holds.

    For each query q of unit norm, from the `hardest` negatives n of the batch (other samples of the other modality):

        h  = norm(alpha n_i + (1 - alpha) n_j),   alpha ~ U(0, 1),    `mixed` of them, i and j any two of the hardest
        h' = norm(beta q + (1 - beta) n_j),       beta ~ U(0, 1/2),   `mixed_with_query` of them

    They join the negatives and carry no gradient. The draws depend on seed, step and sample alone. The paper mixes
    after 10 to 15 epochs without (`start_step`), with a temperature of 0.2; h' lies between images and texts, so start
    when the two are close. Not mixed: the columns of other providers. With a ring, this gathers all columns besides.
    """

    hardest: int = Field(
        default=1024, gt=0, le=2**20, description="nearest negatives to mix; all where the batch has fewer"
    )
    mixed: int = Field(default=1024, ge=0, le=2**20, description="mixtures of two negatives for each query")
    mixed_with_query: int = Field(default=128, ge=0, le=2**20, description="mixtures of a negative and the query")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between))

    def negatives(self, step: PairStep) -> ExtraNegatives | None:  # noqa: D102
        return Mixtures(self, step) if self.mixed + self.mixed_with_query else None


class Mixtures(OwnNegatives):
    """The synthetic negatives of one step's rows; what lasts is which columns are each row's hardest."""

    def __init__(self, options: MixedNegatives, step: PairStep) -> None:
        self._options, self._step, self._pairs = options, step, step.pairs
        x, y = self._pairs.x_rows, self._pairs.y_rows
        self._columns = {rows.kind: rows.all_values.detach() for rows in (x, y)}
        self._queries = {x.kind: y.values.detach(), y.kind: x.values.detach()}  # by the kind of their negatives
        self._nearest: dict[str, tuple[Tensor, Tensor]] = {}

    def num_columns(self, others: str) -> Int64[Tensor, " rows"]:  # noqa: D102
        counts, _ = self._hardest(others)
        return (counts > 0) * (self._options.mixed + self._options.mixed_with_query)

    def block_negatives(self, rows: slice, others: str) -> Float[Tensor, "block negatives dim"]:  # noqa: D102
        counts, places = (values[rows] for values in self._hardest(others))
        columns, queries = self._columns[others], self._queries[others][rows]
        mixed, with_query = self._options.mixed, self._options.mixed_with_query
        drawn = uniforms(
            self._step.seed,
            self._step.step,
            self._pairs.ids[rows],
            f"mixed_negatives/{others}",
            3 * mixed + 2 * with_query,
        ).split([mixed, mixed, mixed, with_query, with_query], dim=1)
        of = counts[:, None].clamp(min=1)
        i = (drawn[0] * of).long()
        j = (i + 1 + (drawn[1] * (of - 1)).long()) % of
        k = (drawn[3] * of).long()
        alpha, beta = (fractions.to(columns)[:, :, None] for fractions in (drawn[2], drawn[4] / 2))
        n_i, n_j, n_k = (columns[places.gather(1, index)] for index in (i, j, k))
        return normalize(torch.cat([n_j.lerp(n_i, alpha), n_k.lerp(queries[:, None, :], beta)], dim=1), dim=2)

    def _hardest(self, others: str) -> tuple[Int64[Tensor, " rows"], Int64[Tensor, "rows hardest"]]:
        """How many of each row's nearest columns are negatives, and those columns, nearest first."""
        if others not in self._nearest:
            similarities, places = top_negatives(
                self._queries[others],
                self._columns[others],
                self._options.hardest,
                self._pairs.other_samples,
            )
            self._nearest[others] = (similarities.isfinite().sum(1), places)
        return self._nearest[others]
