"""Group ordering: positives are to be sorted above the hardest negatives, by a differentiable sorting network."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.term import Needs, PairTerm
from vlm.outputs import PAIR
from vlm.similarity.sorting_network import soft_sort
from vlm.similarity.tiles import slices
from vlm.similarity.top_negatives import ROW_BLOCK, top_negatives


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
        return Needs(outputs=PAIR | {"captions"}, gathered=frozenset({"image", "text"}))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        own = torch.arange(len(pairs.image), device=pairs.image.device)
        captions = pairs.outputs.get("captions")
        positives = (pairs.text, own) if captions is None else (captions, pairs.batch.owners("captions"))
        of_images = self._losses(pairs, pairs.image, pairs.gathered.text, *positives)
        of_texts = self._losses(pairs, pairs.text, pairs.gathered.image, pairs.image, own)
        return pairs.share((of_images + of_texts) / 2)

    def _losses(
        self,
        pairs: Pairs,
        anchors: Float[Tensor, "rows dim"],
        others: Float[Tensor, "all dim"],
        positives: Float[Tensor, "positives dim"],
        whose: Int64[Tensor, " positives"],
    ) -> Float[Tensor, " rows"]:
        """The loss of each anchor; positive m belongs to anchor `whose[m]`. Recomputed in the backward, by blocks."""
        others, positives = others.detach(), positives.detach()
        nearest, places = top_negatives(anchors.detach(), others, self.num_negatives, pairs.gathered.other_samples)
        losses = 0 * anchors.sum(1)  # without negatives anywhere, still a number with a gradient
        for rows, members, count in _alike(whose, nearest.isfinite().sum(1)):
            if count == 0:
                continue
            for block in slices(len(rows), ROW_BLOCK):
                here = rows[block]
                found = checkpoint(
                    self._sorted,
                    anchors[here],
                    (positives, members[block]),
                    (others, places[here, :count]),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                losses = losses.index_add(0, here, found)
        return losses

    def _sorted(
        self, anchors: Tensor, positives: tuple[Tensor, Tensor], negatives: tuple[Tensor, Tensor]
    ) -> Float[Tensor, " rows"]:
        groups = [(rows[places] @ anchors[:, :, None]).squeeze(2) for rows, places in (negatives, positives)]
        ascending = torch.cat([group.sort(dim=1).values for group in groups], dim=1)
        _, masses = soft_sort(ascending, self.steepness)
        count = groups[0].shape[1]
        own = torch.cat([masses[:, :count, :count].sum(2), masses[:, count:, count:].sum(2)], dim=1)
        return -own.log().mean(1)


def _alike(whose: Tensor, num_negatives: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Anchors that have as many positives and as many negatives as each other: their rows, positives, negatives."""
    num_positives = torch.bincount(whose, minlength=len(num_negatives))
    order, starts = whose.argsort(stable=True), num_positives.cumsum(0) - num_positives
    both = torch.stack([num_positives, num_negatives], 1)
    for positives, negatives in both.unique(dim=0).tolist():
        rows = ((num_positives == positives) & (num_negatives == negatives)).nonzero().squeeze(1)
        yield rows, order[starts[rows, None] + torch.arange(positives, device=whose.device)], negatives
