"""Blocks of columns that travel from rank to rank while the tiles of the last one are computed."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from vlm.activity import collective
from vlm.distributed.row_group import RowGroup, as_bits

Visit = Callable[[int, Tensor], Tensor]


class Ring:
    """A circle of ranks: each passes the block it holds to the next one, and computes with it meanwhile.

    With B bytes a block on the wire, F bytes a block of gradients (always in full precision) and W ranks, each rank
    sends (W - 1) B forward, and (W - 1) B of columns again and W F of their gradients backward. That is W F more than a
    gather and its reduce-scatter, for one block to spare in memory instead of W of them. Blocks are padded to the
    fullest rank's rows. `RowGroup` has the sum over a step.
    """

    def __init__(self, ranks: RowGroup, comm_dtype: torch.dtype | None = None) -> None:
        self.ranks = ranks
        self._comm_dtype = comm_dtype
        group = ranks.group or dist.group.WORLD
        assert group is not None
        self._next = dist.get_global_rank(group, (ranks.rank + 1) % ranks.size)
        self._last = dist.get_global_rank(group, (ranks.rank - 1) % ranks.size)

    def blocks(self, rows: Float[Tensor, "rows dim"]) -> Iterator[tuple[int, Float[Tensor, "block dim"]]]:
        """Every rank's block with the rank it is of, this rank's first; the next one is on its way meanwhile."""
        ranks = self.ranks
        block = self._padded(rows).to(self._comm_dtype or rows.dtype)
        for turn in range(ranks.size):
            owner = (ranks.rank - turn) % ranks.size
            coming, pending = block, list[dist.Work]()
            if turn + 1 < ranks.size:
                coming, pending = self._pass_on(block)
            yield owner, block[: ranks.counts[owner]].to(rows.dtype)
            _finish(pending)
            block = coming

    def visit(self, rows: Float[Tensor, "rows dim"], visit: Visit) -> Float[Tensor, "rows dim"]:
        """The sum over ranks of `visit(owner, block)` for this rank's own block: each adds to it as it passes."""
        arriving, pending = self._padded(torch.zeros_like(rows)), list[dist.Work]()
        for owner, block in self.blocks(rows):
            contribution = visit(owner, block)
            _finish(pending)
            arriving, pending = self._pass_on(self._padded(contribution + arriving[: len(contribution)]))
        _finish(pending)
        return arriving[: len(rows)]

    def _pass_on(self, block: Tensor) -> tuple[Tensor, list[dist.Work]]:
        coming = torch.empty_like(block)
        group = self.ranks.group
        send = dist.P2POp(dist.isend, as_bits(block), self._next, group)
        receive = dist.P2POp(dist.irecv, as_bits(coming), self._last, group)
        return coming, dist.batch_isend_irecv([send, receive])

    def _padded(self, rows: Tensor) -> Tensor:
        padded = rows.new_zeros(max(self.ranks.counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return padded


def _finish(pending: list[dist.Work]) -> None:
    with collective("block of the ring"):
        for request in pending:
            request.wait()
