"""Numbers of each sample, kept from one visit to the next: found by sample id, spread over the ranks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed.row_group import RowGroup
from vlm.distributed.world import World
from vlm.objectives.state import RunFacts, TermState

_IDS = "ids"


class SampleTable(TermState):
    """Named columns of one number a sample; a sample not seen before has the columns' defaults.

    The rank `id mod world_size` owns a sample, so that no two ids share a place and no data size need be known. With N
    samples in a batch and k columns, a step sends O(N k) numbers: ids and new values are gathered, owners' values are
    summed. A sample that is in a batch twice is read alike both times; what its first occurrence proposes is kept, in
    the order of ranks and rows. Values are float64 in the CPU's memory: 8 k bytes a sample, and a Python dictionary's
    entry (about 100 bytes).
    """

    def __init__(self, facts: RunFacts, defaults: Mapping[str, float]) -> None:
        self.facts = facts
        self._defaults = torch.tensor(list(defaults.values()), dtype=torch.float64)
        self._columns = tuple(defaults)
        self._shelf = _Shelf(len(defaults))
        self._batch: _GatheredIds | None = None
        self._proposed: Tensor | None = None

    def __len__(self) -> int:
        """Samples that this rank owns."""
        return len(self._shelf.places)

    def read(self, ids: Int64[Tensor, " rows"]) -> dict[str, Float[Tensor, " rows"]]:
        """The columns of this rank's rows of a batch, each sample's as of the last commit. Collective."""
        self._batch = _GatheredIds.of(ids, self.facts.world)
        self._proposed = None
        values = torch.zeros(len(self._batch.ids), len(self._columns), dtype=torch.float64)
        mine = self._owned(self._batch.ids)
        values[mine] = self._shelf.read(self._batch.ids[mine], self._defaults)
        local = self.facts.world.sum(values.to(ids.device))[self._batch.ranks.local]
        return dict(zip(self._columns, local.unbind(1), strict=True))

    def propose(self, values: Mapping[str, Float[Tensor, " rows"]]) -> None:
        """Set the values that the rows read last have after `commit`: all columns, by name."""
        assert self._batch is not None, "a table is read before it is written"
        self._proposed = torch.stack([values[name].detach().double() for name in self._columns], dim=1)

    def commit(self) -> None:  # noqa: D102
        if self._batch is None or self._proposed is None:
            return
        values = self._batch.ranks.gather_constant(self._proposed).cpu()
        mine = self._owned(self._batch.ids)
        ids, values = self._batch.ids[mine], values[mine]
        first = dict(zip(reversed(ids.tolist()), reversed(range(len(ids))), strict=True))
        places = torch.tensor(list(first.values()), dtype=torch.int64)
        self._shelf.store(ids[places], values[places])
        self._batch = self._proposed = None

    def proposal_check(self) -> Float[Tensor, ""] | None:  # noqa: D102
        if self._proposed is None:
            return None
        # -inf is a value here: a sample without negatives.
        return torch.where(self._proposed.isnan().any(), torch.nan, 0.0)

    def discard(self) -> None:  # noqa: D102
        self._batch = self._proposed = None

    def local(self) -> dict[str, Tensor]:  # noqa: D102
        ids, values = self._shelf.contents()
        return {_IDS: ids, **dict(zip(self._columns, values.unbind(1), strict=True))}

    def restore(self, replicated: dict[str, Tensor], local: list[dict[str, Tensor]]) -> None:  # noqa: D102, ARG002
        self._shelf = _Shelf(len(self._columns))
        self._batch = self._proposed = None
        for tensors in local:
            if _IDS not in tensors:
                continue
            mine = self._owned(tensors[_IDS])
            values = self._defaults.repeat(int(mine.sum()), 1)
            for place, name in enumerate(self._columns):
                if name in tensors:  # a column that the saved run did not keep starts at its default
                    values[:, place] = tensors[name][mine]
            self._shelf.store(tensors[_IDS][mine], values)

    def _owned(self, ids: Tensor) -> Tensor:
        return ids % self.facts.world.size == self.facts.world.rank


@dataclass(frozen=True)
class _GatheredIds:
    """The ids of a whole batch on the CPU, and which rank holds which rows."""

    ids: Tensor
    ranks: RowGroup

    @staticmethod
    def of(ids: Tensor, world: World) -> "_GatheredIds":
        counts = torch.zeros(world.size, dtype=torch.int64, device=ids.device)
        counts[world.rank] = len(ids)
        ranks = RowGroup(None, world.rank, tuple(world.sum(counts).tolist()))
        return _GatheredIds(ranks.gather_constant(ids).cpu(), ranks)


class _Shelf:
    """Rows by id, in a tensor that grows by doubling."""

    def __init__(self, num_columns: int) -> None:
        self.places: dict[int, int] = {}
        self._values = torch.empty(0, num_columns, dtype=torch.float64)

    def read(self, ids: Tensor, default: Tensor) -> Tensor:
        places = torch.tensor([self.places.get(one, -1) for one in ids.tolist()], dtype=torch.int64)
        known = places >= 0
        values = default.repeat(len(ids), 1)
        values[known] = self._values[places[known]]
        return values

    def store(self, ids: Tensor, values: Tensor) -> None:
        places = [self.places.setdefault(one, len(self.places)) for one in ids.tolist()]
        if len(self.places) > len(self._values):
            larger = self._values.new_empty(max(len(self.places), 2 * len(self._values)), self._values.shape[1])
            larger[: len(self._values)] = self._values
            self._values = larger
        self._values[torch.tensor(places, dtype=torch.int64)] = values

    def contents(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(list(self.places), dtype=torch.int64), self._values[: len(self.places)]
