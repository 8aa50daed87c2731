"""One source as an endless line of epochs, dealt to lanes in stretches and shuffled in blocks of shards."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.randomness import key_number, permute, scramble

_CACHED_EPOCHS = 4

Positions = NDArray[np.int64]


class StoredRows(NamedTuple):
    """Samples as they are stored: epoch of the visit, number of the shard in its source, row in the shard."""

    epochs: Positions
    shards: Positions
    rows: Positions


class _Epoch(NamedTuple):
    """One epoch of a line: its shards in shuffled order, and the positions where shards and blocks of shards end."""

    shards: Positions
    ends: Positions
    block_ends: Positions
    key: np.uint64


class Line:
    """The order of one source's samples: a function of seed, name, counts, number of lanes and window alone.

    Every epoch is a line of all samples: the shards permuted, cut into blocks of at most `window` shards, each block's
    samples shuffled as a whole. The line is dealt out in `lanes` stretches that are equally long to one sample however
    uneven the shards are; in epoch e lane l owns stretch (l + e) mod lanes, so that the lanes stay within one sample of
    each other for ever. A reader of some lanes touches the shards of their stretches only, a block at a time.
    """

    def __init__(self, seed: int, name: str, counts: Sequence[int] | Positions, lanes: int, window: int) -> None:
        self.name = name
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self._key = ("line", seed, name)
        self._lanes = lanes
        self._window = window
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def find(self, lanes: Positions, numbers: Positions) -> StoredRows:
        """The n-th sample of each lane (0-based).

        Lane l's stretches l, l + 1, l + 2, ... of epochs 0, 1, 2, ... follow one another on a line that repeats without
        end, so its n-th sample lies n places behind the start of stretch l.
        """
        unrolled = lanes * self.num_samples // self._lanes + numbers
        stretches = -(-(unrolled + 1) * self._lanes // self.num_samples) - 1
        return self._stored(stretches - lanes, unrolled % self.num_samples)

    def block(self, place: StoredRows) -> tuple[int, int]:
        """The part (first position, number of samples) of its epoch's line that one sample was shuffled within."""
        epoch = self._epoch(int(place.epochs[0]))
        rank = int(np.flatnonzero(epoch.shards == place.shards[0])[0])
        block = int(np.searchsorted(epoch.block_ends, epoch.ends[rank], side="left"))
        start = int(epoch.block_ends[block - 1]) if block else 0
        return start, int(epoch.block_ends[block]) - start

    def at(self, epoch: int, positions: Positions) -> StoredRows:
        """The samples at these positions of an epoch's line."""
        return self._stored(np.full(positions.shape, epoch, dtype=np.int64), positions)

    def blocks_ahead(self, lane: int, number: int, how_many: int) -> list[list[int]]:
        """The shards that a lane reads from its n-th sample on: of its block there, of its next block, and so on."""
        unrolled = lane * self.num_samples // self._lanes + number
        blocks = []
        for _ in range(how_many):
            stretch = -(-(unrolled + 1) * self._lanes // self.num_samples) - 1
            epoch = self._epoch(stretch - lane)
            position = unrolled % self.num_samples
            block = int(np.searchsorted(epoch.block_ends, position, side="right"))
            start, end = int(epoch.block_ends[block - 1]) if block else 0, int(epoch.block_ends[block])
            first, last = np.searchsorted(epoch.ends, [start, end - 1], side="right")
            blocks.append(epoch.shards[first : last + 1].tolist())
            # On to the next block, or to the lane's next stretch where that comes first.
            stretch_left = (stretch + 1) * self.num_samples // self._lanes - unrolled
            unrolled += min(end - position, stretch_left)
        return blocks

    def _stored(self, epochs: Positions, positions: Positions) -> StoredRows:
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(epochs):
            in_epoch = np.flatnonzero(epochs == number)
            shards[in_epoch], rows[in_epoch] = _shuffled(self._epoch(int(number)), positions[in_epoch])
        return StoredRows(epochs, shards, rows)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            while len(self._epochs) >= _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
            self._epochs[number] = self._make_epoch(number)
        return self._epochs[number]

    def _make_epoch(self, number: int) -> _Epoch:
        key = key_number(*self._key, number)
        num_shards = len(self.counts)
        hashes = scramble(np.arange(num_shards, dtype=np.uint64) ^ key)
        shards = stable_argsort((hashes >> np.uint64(32)).astype(np.uint32))
        ends = np.cumsum(self.counts[shards])
        num_blocks = -(-num_shards // self._window)
        last = np.arange(1, num_blocks + 1) * num_shards // num_blocks - 1
        return _Epoch(shards, ends, ends[last], key)


def stable_argsort(values: NDArray[np.uint32]) -> Positions:
    """Places in the order of the values: by two sorts of 16 bits, for which numpy has a linear one."""
    low, high = ((values >> np.uint32(shift)).astype(np.uint16) for shift in (0, 16))
    places = np.argsort(low, kind="stable")
    return places[np.argsort(high[places], kind="stable")]


def _shuffled(epoch: _Epoch, positions: Positions) -> tuple[Positions, Positions]:
    blocks = np.searchsorted(epoch.block_ends, positions, side="right")
    starts = np.concatenate([[0], epoch.block_ends])[blocks]
    keys = scramble(blocks.astype(np.uint64) ^ scramble(np.full(blocks.shape, epoch.key), 1))
    within = permute(positions - starts, epoch.block_ends[blocks] - starts, keys) + starts
    ranks = np.searchsorted(epoch.ends, within, side="right")
    shards = epoch.shards[ranks]
    return shards, within - np.concatenate([[0], epoch.ends])[ranks]
