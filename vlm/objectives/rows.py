"""Rows of any kind (images, texts, captions, regions): a rank's own, all ranks', and the samples they are of."""

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed.row_group import RowGroup
from vlm.similarity.entry_weights import EntryWeights, EqualKeys
from vlm.similarity.exchange import Exchange
from vlm.similarity.tiles import Columns


class RowSamples:
    """The samples that rows are of, on this rank and on the ranks that it compares with; one for all kinds alike.

    `ranks` are those among which rows are compared, with the number of rows of each; `num_global` counts the rows of
    all ranks, those of other groups too. Building it is a collective.
    """

    def __init__(self, ids: Int64[Tensor, " rows"], exchange: Exchange) -> None:
        self.ids = ids
        self.exchange = exchange
        self.ranks: RowGroup
        self.ranks, self.num_global = exchange.count(len(ids))

    @cached_property
    def all_ids(self) -> Int64[Tensor, " all"]:
        """The ids of all ranks' rows."""
        return self.ranks.gather_constant(self.ids)

    @cached_property
    def others(self) -> tuple[EntryWeights, ...]:
        """The entries of other samples: all but those of a row's own."""
        return (EqualKeys(self.ids, self.all_ids),)

    def mean(self, losses: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
        """This rank's part of the mean over all ranks' rows: world_size / num_global times the sum over its own.

        0 where no rank has any row: a batch may have none of a kind.
        """
        return losses.sum() * (self.exchange.world.size / max(self.num_global, 1))

    def mean_over_groups(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """This rank's part of a value that `ranks` have found together: its mean over groups, weighted by rows."""
        num_local = self.ranks.counts[self.ranks.rank]
        return value * (num_local * self.exchange.world.size / max(self.num_global, 1))


class Rows:
    """Embeddings of one kind: this rank's `values`, and as columns or gathered those of all its ranks.

    Whatever is gathered is gathered once and shared by all terms; a gathered tensor's gradient returns to its owner
    summed over ranks. `index` says which of the output's rows these are; None: all of them.
    """

    def __init__(
        self,
        kind: str,
        values: Float[Tensor, "rows dim"],
        samples: RowSamples,
        together: "JointGather | None" = None,
        index: Int64[Tensor, " rows"] | None = None,
    ) -> None:
        self.kind = kind
        self.values = values
        self.samples = samples
        self.index = index
        self._together = together or JointGather(samples, {kind: values}, {kind})

    @property
    def all_values(self) -> Float[Tensor, "all dim"]:
        """All ranks' rows, in rank order."""
        return self._together[self.kind]

    @cached_property
    def columns(self) -> Columns:
        """All ranks' rows as columns, as the exchange delivers them: gathered, or passing by in a ring."""
        exchange, ranks = self.samples.exchange, self.samples.ranks
        if exchange.config.exchange == "ring":
            return exchange.columns(self.values, ranks)
        # Own rows lie among the gathered, unless low precision has rounded them on their way.
        rounded = exchange.comm_dtype is not None and ranks.size > 1
        return Columns(self.all_values, pairs_at=None if rounded else ranks.local.start)


class JointGather:
    """Rows of several kinds with the same samples, gathered in one collective when the first is asked for.

    `needed` names the kinds that are then gathered together; others follow one by one.
    """

    def __init__(self, samples: RowSamples, values: Mapping[str, Tensor], needed: Iterable[str]) -> None:
        self._samples, self._values = samples, values
        self._needed = set(needed) & values.keys()
        self._gathered: dict[str, Tensor] = {}

    def __getitem__(self, kind: str) -> Tensor:
        """All ranks' rows of a kind. Collective."""
        if kind not in self._gathered:
            missing = sorted((self._needed | {kind}) - self._gathered.keys())
            values = [self._values[name] for name in missing]
            ranks = self._samples.ranks
            if ranks.size > 1:
                widths = [rows.shape[1] for rows in values]
                values = list(
                    ranks.gather(torch.cat(values, dim=1), self._samples.exchange.comm_dtype).split(widths, dim=1)
                )
            self._gathered.update(zip(missing, values, strict=True))
        return self._gathered[kind]
