"""Pairs of rows: two kinds with one row each a sample, their statistics, and the negatives that providers add."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed.row_group import RowGroup
from vlm.objectives.rows import JointGather, Rows, RowSamples
from vlm.similarity.entry_weights import EntryWeights
from vlm.similarity.exchange import Exchange
from vlm.similarity.log_sum_exp import log_sum_exp, paired_log_sum_exp
from vlm.similarity.softplus_sum import paired_softplus_sum, softplus_sum
from vlm.similarity.tiles import Columns


class ExtraNegatives(ABC):
    """Negatives beside those of the batch: a queue, mixtures, counterfactual texts.

    `others` says of which kind the negatives are: images are compared with extra texts, texts with extra images.
    Queries are this rank's rows; which entries count for a query, and whether negatives learn, is theirs to say.
    """

    @abstractmethod
    def num_columns(self, others: str) -> Int64[Tensor, " rows"]:
        """How many extra negatives each row has."""

    @abstractmethod
    def log_sum_exp(
        self, queries: Float[Tensor, "rows dim"], others: str, scale: Float[Tensor, " rows_or_1"]
    ) -> Float[Tensor, " rows"]:
        """log sum_j exp(scale_i <q_i, e_ij>) over a row's extra negatives; -inf where it has none."""

    @abstractmethod
    def softplus_sum(
        self,
        queries: Float[Tensor, "rows dim"],
        others: str,
        scale: Float[Tensor, "1"],
        bias: Float[Tensor, "1"],
    ) -> Float[Tensor, " rows"]:
        """sum_j softplus(scale <q_i, e_ij> + bias) over a row's extra negatives."""


class InfoNceStatistics(NamedTuple):
    """The logit of each pair, and log sum exp over the negatives of each x (among all y), and of each y (among x)."""

    positive: Float[Tensor, " rows"]
    x_negatives: Float[Tensor, " rows"]
    y_negatives: Float[Tensor, " rows"]


class SigmoidStatistics(NamedTuple):
    """The logit of each pair without the bias, and the sum of log(1 + exp(logit + bias)) over its negatives."""

    positive: Float[Tensor, " rows"]
    negatives: Float[Tensor, " rows"]


@dataclass(frozen=True)
class Pairs:
    """Two kinds of rows of which row i of one belongs to row i of the other: x_i and y_i (an image and its text).

    `extra` and `positive_spread` come from providers: further negatives, and by how much pairs are extrapolated apart.
    """

    x_rows: Rows
    y_rows: Rows
    extra: tuple[ExtraNegatives, ...] = ()
    positive_spread: Float[Tensor, " rows"] | None = None

    @property
    def x(self) -> Float[Tensor, "rows dim"]:
        """This rank's first rows."""
        return self.x_rows.values

    @property
    def y(self) -> Float[Tensor, "rows dim"]:
        """This rank's second rows."""
        return self.y_rows.values

    @property
    def all_x(self) -> Float[Tensor, "all dim"]:
        """All ranks' first rows."""
        return self.x_rows.all_values

    @property
    def all_y(self) -> Float[Tensor, "all dim"]:
        """All ranks' second rows."""
        return self.y_rows.all_values

    @property
    def x_columns(self) -> Columns:
        """All ranks' first rows as columns."""
        return self.x_rows.columns

    @property
    def y_columns(self) -> Columns:
        """All ranks' second rows as columns."""
        return self.y_rows.columns

    @property
    def samples(self) -> RowSamples:
        """The samples of the pairs."""
        return self.x_rows.samples

    @property
    def ids(self) -> Int64[Tensor, " rows"]:
        """This rank's sample ids."""
        return self.samples.ids

    @property
    def all_ids(self) -> Int64[Tensor, " all"]:
        """All ranks' sample ids."""
        return self.samples.all_ids

    @property
    def other_samples(self) -> tuple[EntryWeights, ...]:
        """The entries of other samples."""
        return self.samples.others

    @property
    def ranks(self) -> RowGroup:
        """The ranks among which pairs are negatives of each other."""
        return self.samples.ranks

    @property
    def exchange(self) -> Exchange:
        """How the ranks send rows to one another."""
        return self.samples.exchange

    @property
    def matmul_dtype(self) -> torch.dtype | None:
        """The precision of the factors of products; None: that of the rows."""
        return self.exchange.matmul_dtype

    def with_values(
        self, x: Float[Tensor, "rows other"], y: Float[Tensor, "rows other"], gathered: Iterable[str]
    ) -> "Pairs":
        """The same samples with other embeddings, of which the kinds `gathered` will be; without providers' parts."""
        kinds = self.x_rows.kind, self.y_rows.kind
        together = JointGather(self.samples, dict(zip(kinds, (x, y), strict=True)), gathered)
        rows = [Rows(kind, values, self.samples, together) for kind, values in zip(kinds, (x, y), strict=True)]
        return replace(self, x_rows=rows[0], y_rows=rows[1], extra=(), positive_spread=None)

    def mean(self, losses: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
        """This rank's part of the mean over the global batch of one number a pair."""
        return self.samples.mean(losses)

    def positive_similarity(self) -> Float[Tensor, " rows"]:
        """<x_i, y_i>, made harder by the providers: (2 l^2 - 2 l + 1) s + 2 l (1 - l) at a spread of l."""
        return self._spread_apart((self.x * self.y).sum(1), 1.0)

    def infonce_statistics(
        self,
        scale: Float[Tensor, "1"],
        negatives: tuple[EntryWeights, ...] | None = None,
        y_negatives: tuple[EntryWeights, ...] | None = None,
    ) -> InfoNceStatistics:
        """The logits of pairs and the log-sum-exps of their negatives at a scale a.

        log sum_j exp(a <x_i, y_j>) of each x_i over y, and of each y_i over x. Negatives are all entries of other
        samples, or those that `negatives` leaves, and what providers add; those of y (columns) may be others.
        """
        weights = self.other_samples if negatives is None else negatives
        columns = self.y_columns
        if columns.pairs_at is None:
            positive = scale * (self.x * self.y).sum(1)
            x_lse, column_lse = log_sum_exp(
                self.x, columns, scale, weights, y_negatives, matmul_dtype=self.matmul_dtype
            )
        else:
            positive, x_lse, column_lse = paired_log_sum_exp(
                self.x, columns, scale, weights, y_negatives, matmul_dtype=self.matmul_dtype
            )
        y_lse = self.ranks.merge_log_sum_exp(column_lse)
        for extra in self.extra:
            x_lse = _log_add_exp(x_lse, extra.log_sum_exp(self.x, self.y_rows.kind, scale))
            y_lse = _log_add_exp(y_lse, extra.log_sum_exp(self.y, self.x_rows.kind, scale))
        return InfoNceStatistics(self._spread_apart(positive, scale), x_lse, y_lse)

    def sigmoid_statistics(self, scale: Float[Tensor, "1"], bias: Float[Tensor, "1"]) -> SigmoidStatistics:
        """The logits of pairs, and sum_j log(1 + exp(a <x_i, y_j> + b)) over y of other samples.

        What providers add is summed both ways: x against extra y, and y against extra x.
        """
        arguments = (self.x, self.y_columns, scale, bias, self.other_samples)
        if self.y_columns.pairs_at is None:
            positive = scale * (self.x * self.y).sum(1)
            negatives = softplus_sum(*arguments, matmul_dtype=self.matmul_dtype)
        else:
            positive, negatives = paired_softplus_sum(*arguments, matmul_dtype=self.matmul_dtype)
        for extra in self.extra:
            negatives = negatives + extra.softplus_sum(self.x, self.y_rows.kind, scale, bias)
            negatives = negatives + extra.softplus_sum(self.y, self.x_rows.kind, scale, bias)
        return SigmoidStatistics(self._spread_apart(positive, scale), negatives)

    def _spread_apart(self, positive: Tensor, largest: Tensor | float) -> Tensor:
        """Similarities (`largest` 1) or logits (`largest` the scale) of pairs that are extrapolated apart."""
        if self.positive_spread is None:
            return positive
        spread = self.positive_spread
        return (2 * spread**2 - 2 * spread + 1) * positive + 2 * spread * (1 - spread) * largest


def pair_up(
    x: Float[Tensor, "rows dim"],
    y: Float[Tensor, "rows dim"],
    ids: Int64[Tensor, " rows"] | None = None,
    exchange: Exchange | None = None,
    kinds: tuple[str, str] = ("image", "text"),
) -> Pairs:
    """Pairs of plain tensors, row i of x with row i of y; without `ids` all are of samples of their own. Collective."""
    exchange = exchange or Exchange.current(x.device)
    if ids is None:
        ranks, _ = exchange.count(len(x))
        # Ranks of other groups may have the same numbers: they compare nothing with each other.
        ids = torch.arange(ranks.local.start, ranks.local.stop, device=x.device)
    samples = RowSamples(ids, exchange)
    together = JointGather(samples, {kinds[0]: x, kinds[1]: y}, ())
    return Pairs(Rows(kinds[0], x, samples, together), Rows(kinds[1], y, samples, together))


def _log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), whose gradient is 0, not NaN, where neither has an entry."""
    some = ~torch.maximum(a, b).isneginf()
    return torch.where(some, torch.logaddexp(torch.where(some, a, 0.0), torch.where(some, b, 0.0)), float("-inf"))
