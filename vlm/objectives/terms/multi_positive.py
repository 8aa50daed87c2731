"""InfoNCE with several positives a row: equal captions, equal labels, or all captions of an image."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlm.objectives.pairs import Pairs
from vlm.objectives.registry import TERMS
from vlm.objectives.rows import Rows
from vlm.objectives.step import GroupKey, PairStep
from vlm.objectives.term import Needs, PairTerm
from vlm.similarity.entry_weights import EntryWeights, EqualKeys
from vlm.similarity.group_sums import group_sums
from vlm.similarity.listed_pairs import line_log_sum_exp, listed_similarities
from vlm.similarity.log_sum_exp import log_sum_exp


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
            return Needs(outputs=captions | set(self.between), batch_parts=captions)
        return Needs(outputs=frozenset(self.between), gathered=frozenset(self.between[1:]))

    def __call__(self, step: PairStep) -> Float[Tensor, ""]:  # noqa: D102
        keys = step.group_keys(self.by)
        if self.captions == "one":
            return multi_positive(step.pairs, step.logit_scale, keys, form=self.form)
        owners = step.batch.owners("captions")
        x, y = _Side(step.pairs.x_rows, keys), _Side(step.rows("captions"), keys[owners])
        return _many_to_many(x, y, step.logit_scale, self.form)


Form = Literal["log_sum", "mean_log"]


def multi_positive(
    pairs: Pairs, scale: Float[Tensor, "1"], groups: Int64[Tensor, " rows"], *, form: Form = "log_sum"
) -> Float[Tensor, ""]:
    """The loss of `MultiPositive`, pairs of equal keys being each other's positives."""
    ranks = pairs.ranks
    all_groups = ranks.gather_constant(groups)
    places = torch.arange(ranks.num_rows, device=groups.device)
    # A sample that is in the batch twice may come with two captions.
    negatives = (*pairs.other_samples, EqualKeys(groups, all_groups))
    pair_logit, x_negatives, y_negatives = pairs.infonce_statistics(scale, negatives)
    matrix = _Matrix(pairs.x_rows, pairs.y_rows, scale)
    others = matrix.positives(EqualKeys(groups, all_groups, keep=True), EqualKeys(places[ranks.local], places))
    positives = tuple(torch.logaddexp(pair_logit, log_sum) for log_sum in others)
    losses = -(logsigmoid(positives[0] - x_negatives) + logsigmoid(positives[1] - y_negatives))
    if form == "mean_log":
        means = [
            (pair_logit + scale * (x * (sums - y)).sum(1)) / counts
            for x, y, (sums, counts) in (
                (pairs.x, pairs.y, group_sums(pairs.y, groups, groups, ranks)),
                (pairs.y, pairs.x, group_sums(pairs.x, groups, groups, ranks)),
            )
        ]
        losses = losses + (positives[0] - means[0]) + (positives[1] - means[1])
    return pairs.mean(losses / 2)


class _Side(NamedTuple):
    """Rows of one kind, several a sample perhaps, and the group of each."""

    rows: Rows
    groups: Int64[Tensor, " rows"]


def _many_to_many(x: _Side, y: _Side, scale: Tensor, form: Form) -> Float[Tensor, ""]:
    """The loss between rows that need not be one a sample."""
    (x_rows, x_groups), (y_rows, y_groups) = x, y
    all_y_groups = y_rows.samples.ranks.gather_constant(y_groups)
    samples = EqualKeys(x_rows.samples.ids, y_rows.samples.all_ids)
    matrix = _Matrix(x_rows, y_rows, scale)
    negatives = matrix.log_sum_exp((samples, EqualKeys(x_groups, all_y_groups)))
    positives = matrix.positives(EqualKeys(x_groups, all_y_groups, keep=True))
    x_losses, y_losses = (-logsigmoid(p - n) for p, n in zip(positives, negatives, strict=True))
    if form == "mean_log":
        sums, counts = group_sums(y_rows.values, y_groups, x_groups, y_rows.samples.ranks)
        x_losses = x_losses + (positives[0] - scale * (x_rows.values * sums).sum(1) / counts)
        sums, counts = group_sums(x_rows.values, x_groups, y_groups, x_rows.samples.ranks)
        y_losses = y_losses + (positives[1] - scale * (y_rows.values * sums).sum(1) / counts)
    return (x_rows.samples.mean(x_losses) + y_rows.samples.mean(y_losses)) / 2


@dataclass(frozen=True)
class _Matrix:
    """The matrix of this rank's rows x against all rows y."""

    x: Rows
    y: Rows
    scale: Float[Tensor, "1"]

    def log_sum_exp(self, weights: tuple[EntryWeights, ...]) -> tuple[Tensor, Tensor]:
        """Over all y of each own x, and over all x of each own y."""
        dtype = self.x.samples.exchange.matmul_dtype
        x_lse, column_lse = log_sum_exp(self.x.values, self.y.columns, self.scale, weights, matmul_dtype=dtype)
        return x_lse, self.y.samples.ranks.merge_log_sum_exp(column_lse)

    def positives(self, equal: EqualKeys, left_out: EqualKeys | None = None) -> tuple[Tensor, Tensor]:
        """`log_sum_exp` over the entries that `equal` keeps, but for those of `left_out`; -inf where there are none.

        Few are computed one by one; many, or with columns that pass by in a ring, tile by tile.
        """
        weights = (equal,) if left_out is None else (equal, left_out)
        if equal.listed is None or self.y.columns.ring is not None:
            return self.log_sum_exp(weights)
        i, j = equal.listed
        if left_out is not None:
            others = left_out.row_keys[i] != left_out.column_keys[j]
            i, j = i[others], j[others]
        logits = self.scale * listed_similarities(self.x.values, self.y.columns.rows, i, j)
        x_lse = line_log_sum_exp(logits, i, len(self.x.values))
        column_lse = line_log_sum_exp(logits, j, self.y.columns.num_columns)
        return x_lse, self.y.samples.ranks.merge_log_sum_exp(column_lse)
