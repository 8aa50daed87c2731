"""InfoNCE with several positives a row: equal captions, equal labels, or all captions of an image."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import GroupKey, Pairs, group_keys
from vlm.objectives.registry import TERMS
from vlm.objectives.term import Needs, PairTerm
from vlm.outputs import PAIR
from vlm.similarity.collectives import RowGroup
from vlm.similarity.entries import EntryWeights, EqualKeys
from vlm.similarity.group_sums import group_sums
from vlm.similarity.listed_pairs import listed_similarities, log_sum_exp_of_lines
from vlm.similarity.log_sum_exp import log_sum_exp
from vlm.similarity.tiles import Columns


@TERMS.register("multi_positive")
class MultiPositive(PairTerm):
    """The symmetric InfoNCE loss in which every column of the row's own group is a positive. Of a row i, with groups P:

    log_sum:   -log( sum_{j in P(i)} exp(a s_ij) / sum_j exp(a s_ij) )     any one positive will do
    mean_log:  -1/|P(i)| sum_{j in P(i)} log( exp(a s_ij) / sum_k exp(a s_ik) )     all of them must be near

    with s_ij = <x_i, y_j> and a the logit scale. value = (mean over images + mean over texts) / 2, over all ranks. The
    first is of Zhou et al. (PairingNet, 2024), the second the form of Khosla et al. (2020); the first is never the
    larger one. Without equal keys both are `clip`.

    With `captions: all` the texts are all captions of all images, the positives of an image all captions of its group,
    and the mean over texts is over captions: an image with more captions counts more there. The key of a caption is its
    image's. No providers attach, as their negatives are of single pairs. Few positives a row cost little beside the
    denominators; many (labels of a few classes) a second pass over the tiles, as does a ring.

    Raises EveryRankError when it is evaluated by label on data without labels, or on data without all captions.
    """

    form: Literal["log_sum", "mean_log"] = Field(
        default="log_sum", description="the logarithm of the positives' sum, or the mean of their logarithms"
    )
    by: GroupKey = Field(default="caption", description="what makes a group: the same sample, caption text or label")
    captions: Literal["one", "all"] = Field(
        default="one", description="texts: the caption of each pair, or all captions (the data's caption policy `all`)"
    )

    @property
    def takes_providers(self) -> bool:  # type: ignore[override]
        """With `captions: one`."""
        return self.captions == "one"

    def needs(self) -> Needs:  # noqa: D102
        if self.captions == "all":
            captions = frozenset({"captions"})
            return Needs(outputs=PAIR | captions, batch_parts=captions)
        return Needs(gathered=frozenset({"text"}))

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:  # noqa: D102
        return self._of_captions(pairs) if self.captions == "all" else self._of_pairs(pairs)

    def _of_pairs(self, pairs: Pairs) -> Tensor:
        keys, ranks, scale = group_keys(pairs, self.by), pairs.ranks, pairs.logit_scale
        all_keys = ranks.gather_constant(keys)
        places = torch.arange(ranks.num_rows, device=keys.device)
        # A sample that is in the batch twice may come with two captions.
        negatives = (*pairs.gathered.other_samples, EqualKeys(keys, all_keys))
        own, of_images, of_texts = pairs.logits(scale, negatives)
        matrix = _Matrix(pairs, pairs.gathered.text_columns, ranks)
        others = matrix.positives(EqualKeys(keys, all_keys, keep=True), EqualKeys(places[ranks.own], places))
        positives = tuple(torch.logaddexp(own, log_sum) for log_sum in others)
        losses = -(logsigmoid(positives[0] - of_images) + logsigmoid(positives[1] - of_texts))
        if self.form == "mean_log":
            means = [
                (own + scale * (x * (sums - y)).sum(1)) / counts
                for x, y, (sums, counts) in (
                    (pairs.image, pairs.text, group_sums(pairs.text, keys, keys, ranks)),
                    (pairs.text, pairs.image, group_sums(pairs.image, keys, keys, ranks)),
                )
            ]
            losses = losses + (positives[0] - means[0]) + (positives[1] - means[1])
        return pairs.share(losses / 2)

    def _of_captions(self, pairs: Pairs) -> Tensor:
        captions, owners = pairs.outputs["captions"], pairs.batch.owners("captions")
        keys, scale = group_keys(pairs, self.by), pairs.logit_scale
        caption_keys = keys[owners]
        caption_ranks, num_captions = pairs.exchange.count(len(captions))
        columns = pairs.exchange.columns(captions, caption_ranks)
        all_keys = caption_ranks.gather_constant(caption_keys)
        samples = EqualKeys(pairs.ids, caption_ranks.gather_constant(pairs.ids[owners]))
        matrix = _Matrix(pairs, columns, caption_ranks)
        negatives = matrix.log_sum_exp((samples, EqualKeys(keys, all_keys)))
        positives = matrix.positives(EqualKeys(keys, all_keys, keep=True))
        of_images, of_captions = (-logsigmoid(p - n) for p, n in zip(positives, negatives, strict=True))
        if self.form == "mean_log":
            sums, counts = group_sums(captions, caption_keys, keys, caption_ranks)
            of_images = of_images + (positives[0] - scale * (pairs.image * sums).sum(1) / counts)
            sums, counts = group_sums(pairs.image, keys, caption_keys, pairs.ranks)
            of_captions = of_captions + (positives[1] - scale * (captions * sums).sum(1) / counts)
        share_of_captions = of_captions.sum() * (pairs.exchange.world.size / num_captions)
        return (pairs.share(of_images) + share_of_captions) / 2


@dataclass(frozen=True)
class _Matrix:
    """The pair matrix of this rank's images against all texts."""

    pairs: Pairs
    columns: Columns
    ranks: RowGroup  # how many texts each rank has

    def log_sum_exp(self, weights: tuple[EntryWeights, ...]) -> tuple[Tensor, Tensor]:
        """Over texts of each own image, and over all images of each own text."""
        of_images, parts = log_sum_exp(
            self.pairs.image, self.columns, self.pairs.logit_scale, weights, product=self.pairs.exchange.product
        )
        return of_images, self.ranks.merge_log_sum_exp(parts)

    def positives(self, kept: EqualKeys, left_out: EqualKeys | None = None) -> tuple[Tensor, Tensor]:
        """`log_sum_exp` over the entries that `kept` keeps, but for those of `left_out`; -inf where there are none.

        Few are computed one by one; many, or with columns that pass by in a ring, tile by tile.
        """
        weights = (kept,) if left_out is None else (kept, left_out)
        if kept.listed is None or self.columns.ring is not None:
            return self.log_sum_exp(weights)
        i, j = kept.listed
        if left_out is not None:
            others = left_out.row_keys[i] != left_out.column_keys[j]
            i, j = i[others], j[others]
        logits = self.pairs.logit_scale * listed_similarities(self.pairs.image, self.columns.rows, i, j)
        of_images = log_sum_exp_of_lines(logits, i, len(self.pairs.image))
        parts = log_sum_exp_of_lines(logits, j, self.columns.num_columns)
        return of_images, self.ranks.merge_log_sum_exp(parts)
