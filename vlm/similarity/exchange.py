"""Which ranks compare their pairs, and how they send embeddings to one another; decided once a run."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from vlm.distributed.ring import Ring
from vlm.distributed.row_group import RowGroup
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.tiles import Columns

_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "auto": None}  # auto, where a recipe has not decided


class Exchange:
    """The ranks among which pairs are negatives of each other: all of them, or this rank's group.

    Building it is a collective of all ranks (each group of processes is made on every rank, in the same order).
    """

    def __init__(self, world: World, config: SimilarityConfig | None = None) -> None:
        self.world = world
        self.config = config or SimilarityConfig()
        self.comm_dtype = _PRECISIONS[self.config.wire]
        self.matmul_dtype = _PRECISIONS[self.config.product]
        size = self.config.group_ranks or world.size
        if world.size % size:
            raise EveryRankError(f"similarity.group_ranks: {world.size} ranks do not make groups of {size}")
        self._first = world.rank - world.rank % size
        self._size = size
        self._group: dist.ProcessGroup | None = None
        if size < world.size:
            for first in range(0, world.size, size):
                group = dist.new_group(list(range(first, first + size)))
                if first == self._first and isinstance(group, dist.ProcessGroup):
                    self._group = group

    @staticmethod
    def current(device: torch.device | None = None) -> "Exchange":
        """All ranks of the default process group, or this process alone, with rows gathered in full precision."""
        return Exchange(World.current(device))

    def count(self, num_rows: int) -> tuple[RowGroup, int]:
        """How many rows each rank of the group holds, and how many all ranks hold. Collective."""
        if self.world.size == 1:
            return RowGroup(None, 0, (num_rows,)), num_rows
        local_count = torch.zeros(self.world.size, dtype=torch.int64, device=self.world.device)
        local_count[self.world.rank] = num_rows
        counts = self.world.sum(local_count).tolist()
        inside = tuple(counts[self._first : self._first + self._size])
        return RowGroup(self._group, self.world.rank - self._first, inside), sum(counts)

    def columns(self, rows: Float[Tensor, "rows dim"], ranks: RowGroup) -> Columns:
        """The rows of all ranks of the group as columns: gathered, or passing by in a ring."""
        if self.config.exchange == "ring" and ranks.size > 1:
            return Columns(rows, Ring(ranks, self.comm_dtype), pairs_at=0)
        return Columns(ranks.gather(rows, self.comm_dtype))
