"""The endless sequence of global batches over all sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.order.line import Line, StoredRows
from data.order.mix import Mix, make_mix
from data.order.neighbours import NeighbourLine, Neighbours

MAX_LANES = 1024
_BATCHES_AHEAD = 8


@dataclass(frozen=True)
class SourceCounts:
    """A source as the order sees it: its name (which keys its shuffles), its shards' sample counts, its weight.

    With `neighbours` its samples come in batches of these.
    """

    name: str
    counts: Sequence[int] | NDArray[np.int64]
    weight: float = 1.0
    neighbours: Neighbours | None = None


class Picks(NamedTuple):
    """For some slots of a global batch: the source, that source's epoch, its shard's number, the row in the shard."""

    sources: NDArray[np.int64]
    epochs: NDArray[np.int64]
    shards: NDArray[np.int64]
    rows: NDArray[np.int64]


class Order:
    """The sample in slot p of global batch s: a function of seed, sources, global batch, lanes and window alone.

    A source with neighbours gives each global batch the first of a block of its own: as many as the batch has slots of
    it, by their rank among these.

    Lanes are a fixed number of virtual readers that know no ranks and no workers. Slot p belongs to lane
    floor(p * lanes / global_batch), so a rank's contiguous slots belong to few lanes, and a lane takes the next
    global_batch / lanes places of its own sequence in every batch. The position in the data is the number of the step:
    there is no state, and any step costs the same.
    """

    def __init__(
        self,
        seed: int,
        sources: Sequence[SourceCounts],
        global_batch: int,
        *,
        lanes: int | None = None,
        window: int = 8,
    ) -> None:
        self.global_batch = global_batch
        self.lanes = default_lanes(global_batch) if lanes is None else lanes
        if global_batch % self.lanes:
            raise ValueError(f"{self.lanes} lanes do not divide a global batch of {global_batch}")
        self.mix: Mix = make_mix({source.name: source.weight for source in sources}, global_batch, self.lanes)
        self.lines = tuple(self._line(seed, number, source, window) for number, source in enumerate(sources))

    def picks(self, step: int, slots: range) -> Picks:
        """The samples of these slots of global batch number `step`."""
        lanes, places = self._places(step, slots)
        sources = self.mix.sources(lanes, places)
        numbers = self.mix.numbers(sources, lanes, places)
        picks = Picks(sources, *(np.empty_like(sources) for _ in range(3)))
        for source in np.unique(sources):
            from_source, line = np.flatnonzero(sources == source), self.lines[source]
            if isinstance(line, NeighbourLine):
                stored = line.find(step, self._ranks(step, slots, int(source))[from_source])
            else:
                stored = line.find(lanes[from_source], numbers[from_source])
            picks.epochs[from_source], picks.shards[from_source], picks.rows[from_source] = stored
        return picks

    def neighbourhood(self, pick: Picks) -> tuple[Line | NeighbourLine, tuple[int, int]]:
        """The line of one sample and the part of its epoch that it was shuffled within, or of its cluster."""
        line = self.lines[int(pick.sources[0])]
        return line, line.block(StoredRows(pick.epochs, pick.shards, pick.rows))

    def shards_ahead(self, step: int, slots: range, blocks: int = 2) -> list[tuple[int, int]]:
        """(source, shard) that a reader of these slots needs from `step` on, first needed first, `blocks` a lane."""
        lanes, places = self._places(step, range(slots.start, slots.stop, self.mix.per_batch))
        depths: list[dict[tuple[int, int], None]] = [{} for _ in range(blocks)]
        self._neighbours_ahead(step, slots, depths)
        for source, line in enumerate(self.lines):
            if isinstance(line, NeighbourLine):
                continue
            numbers = self.mix.numbers(np.full_like(lanes, source), lanes, places)
            for lane, number in zip(lanes.tolist(), numbers.tolist(), strict=True):
                for depth, shards in zip(depths, line.blocks_ahead(lane, number, blocks), strict=True):
                    depth.update({(source, shard): None for shard in shards})
        return list(dict.fromkeys(place for depth in depths for place in depth))

    def _neighbours_ahead(self, step: int, slots: range, depths: list[dict[tuple[int, int], None]]) -> None:
        """Add the shards of the next batches of neighbours, which may be any."""
        if not any(isinstance(line, NeighbourLine) for line in self.lines):
            return
        for depth, shards in enumerate(depths):
            for ahead in range(depth * _BATCHES_AHEAD, (depth + 1) * _BATCHES_AHEAD):
                picks = self.picks(step + ahead, slots)
                found = zip(picks.sources.tolist(), picks.shards.tolist(), strict=True)
                shards.update({place: None for place in found if isinstance(self.lines[place[0]], NeighbourLine)})

    def _line(self, seed: int, number: int, source: SourceCounts, window: int) -> Line | NeighbourLine:
        if source.neighbours is None:
            return Line(seed, source.name, source.counts, self.lanes, window)
        most = self.mix.most_in_a_batch(number)
        return NeighbourLine(seed, source.name, np.asarray(source.counts, np.int64), source.neighbours, most)

    def _ranks(self, step: int, slots: range, source: int) -> NDArray[np.int64]:
        """For each slot, how many slots of the global batch before it are of the source."""
        if len(self.lines) == 1:
            return np.arange(slots.start, slots.stop, slots.step, dtype=np.int64)
        of_source = (self.mix.sources(*self._places(step, range(slots.stop))) == source).astype(np.int64)
        before: NDArray[np.int64] = np.cumsum(of_source) - of_source
        return before[slots.start : slots.stop : slots.step]

    def _places(self, step: int, slots: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        lanes, within = np.divmod(np.arange(slots.start, slots.stop, slots.step, dtype=np.int64), self.mix.per_batch)
        return lanes, step * self.mix.per_batch + within


def default_lanes(global_batch: int) -> int:
    """The largest divisor of the global batch up to 1,024."""
    return max(lanes for lanes in range(1, min(MAX_LANES, global_batch) + 1) if global_batch % lanes == 0)
