"""The endless sequence of global batches over all sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.order.line import Line, StoredRows
from data.order.mix import Mix, make_mix

MAX_LANES = 1024


@dataclass(frozen=True)
class SourceCounts:
    """A source as the order sees it: its name (which keys its shuffles), its shards' sample counts, its weight."""

    name: str
    counts: Sequence[int] | NDArray[np.int64]
    weight: float = 1.0


class Picks(NamedTuple):
    """For some slots of a global batch: the source, that source's epoch, its shard's number, the row in the shard."""

    sources: NDArray[np.int64]
    epochs: NDArray[np.int64]
    shards: NDArray[np.int64]
    rows: NDArray[np.int64]


class Order:
    """The sample in slot p of global batch s: a function of seed, sources, global batch, lanes and window alone.

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
        self.lines = tuple(Line(seed, source.name, source.counts, self.lanes, window) for source in sources)
        self.mix: Mix = make_mix({source.name: source.weight for source in sources}, global_batch, self.lanes)

    def picks(self, step: int, slots: range) -> Picks:
        """The samples of these slots of global batch number `step`."""
        lanes, places = self._places(step, slots)
        sources = self.mix.sources(lanes, places)
        numbers = self.mix.numbers(sources, lanes, places)
        picks = Picks(sources, *(np.empty_like(sources) for _ in range(3)))
        for source in np.unique(sources):
            from_source = np.flatnonzero(sources == source)
            stored = self.lines[source].find(lanes[from_source], numbers[from_source])
            picks.epochs[from_source], picks.shards[from_source], picks.rows[from_source] = stored
        return picks

    def neighbourhood(self, pick: Picks) -> tuple[Line, tuple[int, int]]:
        """The line of one sample and the part of its epoch that it was shuffled within."""
        line = self.lines[int(pick.sources[0])]
        return line, line.block(StoredRows(pick.epochs, pick.shards, pick.rows))

    def shards_ahead(self, step: int, slots: range, blocks: int = 2) -> list[tuple[int, int]]:
        """(source, shard) that a reader of these slots needs from `step` on, first needed first, `blocks` a lane."""
        lanes, places = self._places(step, range(slots.start, slots.stop, self.mix.per_batch))
        depths: list[dict[tuple[int, int], None]] = [{} for _ in range(blocks)]
        for source, line in enumerate(self.lines):
            numbers = self.mix.numbers(np.full_like(lanes, source), lanes, places)
            for lane, number in zip(lanes.tolist(), numbers.tolist(), strict=True):
                for depth, shards in zip(depths, line.blocks_ahead(lane, number, blocks), strict=True):
                    depth.update({(source, shard): None for shard in shards})
        return list(dict.fromkeys(place for depth in depths for place in depth))

    def _places(self, step: int, slots: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        lanes, within = np.divmod(np.arange(slots.start, slots.stop, slots.step, dtype=np.int64), self.mix.per_batch)
        return lanes, step * self.mix.per_batch + within


def default_lanes(global_batch: int) -> int:
    """The largest divisor of the global batch up to 1,024."""
    return max(lanes for lanes in range(1, min(MAX_LANES, global_batch) + 1) if global_batch % lanes == 0)
