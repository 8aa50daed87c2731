"""Group ordering: positives are to be sorted above the hardest negatives, by a differentiable sorting network."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.step import PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.objectives.terms.sorting_network import soft_sort
from vlm.similarity.tiles import slices
from vlm.similarity.top_k import ROW_BLOCK, top_negatives


@TERMS.register("ordering")
class Ordering(PairTerm):
    """How far sorting an anchor's similarities puts its positives above its nearest negatives. No temperature.

    For each anchor the similarities of its K nearest negatives and of its P positives, each group ascending, go through
    a sorting network (`soft_sort`); with Q its matrix of masses and q_e the mass of element e on the ranks of its own
    group, the P highest or the K lowest,

        loss = - 1/(K + P) sum_e log q_e

    and value is the mean over anchors and both directions. An image's positives are its captions (all of them where the
    batch brings several), a text's is its image; negatives are of other samples, on all ranks. Only the anchor gets a
    gradient. With fewer negatives than K, those there are; without any, an anchor's loss is 0. (GroCo, Learning by
    Sorting: Shvetsova et al., 2023. It halves the cross-entropies of both groups' masses, which are equal.)
    """

    num_negatives: int = Field(default=10, gt=0, le=4096, description="nearest negatives that are sorted (K)")
    steepness: float = Field(default=1.0, gt=0, le=1e6, description="of the comparison 1/2 + atan(steepness x) / pi")

    def needs(self) -> Needs:  # noqa: D102
        return Needs(outputs=frozenset({"captions", *self.between}), gathered=frozenset(self.between))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        captions, positives = step.outputs.get("captions"), None
        if captions is not None and self.between == ("image", "text"):
            positives = captions, step.batch.owners("captions")
        return ordering(step.pairs, positives, num_negatives=self.num_negatives, steepness=self.steepness)


def ordering(
    pairs: Pairs,
    positives: tuple[Float[Tensor, "positives dim"], Int64[Tensor, " positives"]] | None = None,
    *,
    num_negatives: int = 10,
    steepness: float = 1.0,
) -> Float[Tensor, ""]:
    """The loss of `Ordering`; the positives of x_i are y_i, or all rows of `positives` whose owner is i."""
    places = torch.arange(len(pairs.x), device=pairs.x.device)
    x_positives = (pairs.y, places) if positives is None else positives
    network = _Network(num_negatives, steepness)
    x_losses = network.losses(pairs, pairs.x, pairs.all_y, *x_positives)
    y_losses = network.losses(pairs, pairs.y, pairs.all_x, pairs.x, places)
    return pairs.mean((x_losses + y_losses) / 2)


class _Network(NamedTuple):
    num_negatives: int
    steepness: float

    def losses(
        self,
        pairs: Pairs,
        anchors: Float[Tensor, "rows dim"],
        others: Float[Tensor, "all dim"],
        positives: Float[Tensor, "positives dim"],
        owners: Int64[Tensor, " positives"],
    ) -> Float[Tensor, " rows"]:
        """The loss of each anchor; positive m belongs to anchor `owners[m]`. Recomputed in the backward, by blocks."""
        others, positives = others.detach(), positives.detach()
        nearest, places = top_negatives(anchors.detach(), others, self.num_negatives, pairs.other_samples)
        losses = 0 * anchors.sum(1)  # without negatives anywhere, still a number with a gradient
        for rows, members, count in _alike(owners, nearest.isfinite().sum(1)):
            if count == 0:
                continue
            for block in slices(len(rows), ROW_BLOCK):
                block_rows = rows[block]
                block_losses = checkpoint(
                    self._sorted,
                    anchors[block_rows],
                    (positives, members[block]),
                    (others, places[block_rows, :count]),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                losses = losses.index_add(0, block_rows, block_losses)
        return losses

    def _sorted(
        self, anchors: Tensor, positives: tuple[Tensor, Tensor], negatives: tuple[Tensor, Tensor]
    ) -> Float[Tensor, " rows"]:
        groups = [(rows[places] @ anchors[:, :, None]).squeeze(2) for rows, places in (negatives, positives)]
        ascending = torch.cat([group.sort(dim=1).values for group in groups], dim=1)
        _, masses = soft_sort(ascending, self.steepness)
        count = groups[0].shape[1]
        on_their_ranks = torch.cat([masses[:, :count, :count].sum(2), masses[:, count:, count:].sum(2)], dim=1)
        return -on_their_ranks.log().mean(1)


def _alike(owners: Tensor, num_negatives: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Anchors that have as many positives and as many negatives as each other: their rows, positives, negatives."""
    num_positives = torch.bincount(owners, minlength=len(num_negatives))
    order, starts = owners.argsort(stable=True), num_positives.cumsum(0) - num_positives
    both = torch.stack([num_positives, num_negatives], 1)
    for positives, negatives in both.unique(dim=0).tolist():
        rows = ((num_positives == positives) & (num_negatives == negatives)).nonzero().squeeze(1)
        yield rows, order[starts[rows, None] + torch.arange(positives, device=owners.device)], negatives
