"""Collectives over rows that the ranks hold in unequal numbers, with and without gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm.activity import collective


@dataclass(frozen=True)
class RowGroup:
    """The ranks of one process group and how many rows each of them holds, in rank order.

    What each of W ranks sends, with B bytes of rows on the fullest rank (the others are padded to it) and V bytes of a
    vector over all rows; backends that work around a circle of ranks send just that:

    gather: (W - 1) B forward, (W - 1) B backward; gather_constant: (W - 1) B; sum_to_owners: (W - 1) B each way;
    sum: 2 (W - 1) / W V each way; largest: 2 (W - 1) / W V; merge_log_sum_exp: 4 (W - 1) / W V forward, (W - 1) B
    backward, with B those of one number a row.

    A whole step of `clip` with n rows on the fullest rank, N on all, dim D, and e bytes a number on the wire sends from
    each rank

    gather: (W - 1) n (2 D e + 8 + 4) + 16 (W - 1) / W N bytes,
    ring:   (W - 1) n (2 D e + 8 + 4) + 16 (W - 1) / W N + 4 W n D + 16 (W - 1) / W bytes,
    groups: the same with W, n and N those of the group

    (8: ids; 4: gradients of log-sum-exps; 16 N: their merge; 4 W n D: gradients that pass by; the last: a largest
    norm, and whether one reference was enough)
    and 16 (R - 1) bytes for the row counts of all R ranks. Gathered over two modalities at once, D counts twice. Over a
    dense loss's gather of both modalities, columns alone save half.
    """

    group: dist.ProcessGroup | None
    rank: int
    counts: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.counts)

    @property
    def num_rows(self) -> int:
        """Rows of all ranks together."""
        return sum(self.counts)

    @property
    def local(self) -> slice:
        """Where this rank's rows lie among all rows."""
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])

    def gather(
        self, rows: Shaped[Tensor, "rows ..."], comm_dtype: torch.dtype | None = None
    ) -> Shaped[Tensor, "all ..."]:
        """Every rank's rows, in rank order; the backward sums over ranks what each says about a row."""
        gathered: Tensor = rows if self.size == 1 else _Gather.apply(rows, self, comm_dtype)
        return gathered

    def gather_constant(self, rows: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "all ..."]:
        """Every rank's rows of any type, in rank order, without gradient."""
        return rows.detach() if self.size == 1 else all_gather_rows(rows.detach(), self)

    def sum_to_owners(self, values: Shaped[Tensor, "all ..."]) -> Shaped[Tensor, "rows ..."]:
        """The sum over ranks of `values`, of which each rank gets its own rows. Differentiable."""
        summed: Tensor = values if self.size == 1 else _SumToOwners.apply(values, self)
        return summed

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, the same on each; the gradient is that of the sum of all ranks' losses."""
        total: Tensor = value if self.size == 1 else _Sum.apply(value, self)
        return total

    def largest(self, value: Tensor) -> Tensor:
        """The element-wise maximum over ranks, without gradient."""
        most = value.detach().clone()
        if self.size > 1:
            with collective("largest"):
                dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        return most

    def merge_log_sum_exp(self, log_sums: Shaped[Tensor, " all"]) -> Shaped[Tensor, " rows"]:
        """log(sum over ranks of exp(log_sums)), of which each rank gets its own rows. Differentiable.

        Two all-reduces of N numbers each: the largest of each place, then the sum beside it.
        """
        merged: Tensor = log_sums if self.size == 1 else _MergeLogSumExp.apply(log_sums, self)
        return merged


def all_gather_rows(rows: Tensor, ranks: RowGroup, comm_dtype: torch.dtype | None = None) -> Tensor:
    """Every rank's rows, in rank order, without gradient."""
    longest = max(ranks.counts)
    sent = _padded(rows if comm_dtype is None else rows.to(comm_dtype), longest)
    received = sent.new_empty(ranks.size * longest, *rows.shape[1:])
    with collective("gather of rows"):
        dist.all_gather_into_tensor(as_bits(received), as_bits(sent), group=ranks.group)
    return _unpadded(received, ranks.counts).to(rows.dtype)


def reduce_scatter_rows(values: Tensor, ranks: RowGroup, comm_dtype: torch.dtype | None = None) -> Tensor:
    """This rank's rows of the sum of `values` over ranks, without gradient. A low-precision wire still sums in full."""
    longest = max(ranks.counts)
    blocks = [_padded(block, longest) for block in values.split(list(ranks.counts))]
    sent = torch.cat(blocks)
    if comm_dtype is None:
        local_rows = sent.new_empty(longest, *values.shape[1:])
        with collective("sum to owners"):
            dist.reduce_scatter_tensor(local_rows, sent, group=ranks.group)
    else:
        low = sent.to(comm_dtype)
        received = torch.empty_like(low)
        with collective("sum to owners"):
            dist.all_to_all_single(as_bits(received), as_bits(low), group=ranks.group)
        local_rows = received.view(ranks.size, longest, *values.shape[1:]).to(values.dtype).sum(0)
    return local_rows[: ranks.counts[ranks.rank]]


def as_bits(tensor: Tensor) -> Tensor:
    """bf16 as bytes: not every backend moves bf16, nor 16-bit integers."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor


def _padded(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


def _unpadded(padded: Tensor, counts: Sequence[int]) -> Tensor:
    if len(set(counts)) == 1:
        return padded
    blocks = padded.view(len(counts), -1, *padded.shape[1:])
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: RowGroup, comm_dtype: torch.dtype | None) -> Tensor:
        """The rows of all ranks, in rank order."""
        ctx.ranks, ctx.comm_dtype = ranks, comm_dtype
        return all_gather_rows(rows, ranks, comm_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The sum over ranks of the gradients for this rank's rows."""
        return reduce_scatter_rows(gradient, ctx.ranks, ctx.comm_dtype), None, None


class _SumToOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: RowGroup) -> Tensor:
        """This rank's rows of the sum over ranks."""
        ctx.ranks = ranks
        return reduce_scatter_rows(values, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradients that all ranks have for their rows, in rank order."""
        return all_gather_rows(gradient, ctx.ranks), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: RowGroup) -> Tensor:
        """The sum over ranks, the same on each."""
        ctx.ranks = ranks
        total = value.clone()
        with collective("sum of values"):
            dist.all_reduce(total, group=ranks.group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The sum over ranks of the gradients for it."""
        total = gradient.clone()
        with collective("sum of gradients of values"):
            dist.all_reduce(total, group=ctx.ranks.group)
        return total, None


class _MergeLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_sums: Tensor, ranks: RowGroup) -> Tensor:
        """This rank's rows of the logarithm of the sum over ranks of exponentials."""
        largest = log_sums.clone()
        with collective("largest of log-sum-exps"):
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=ranks.group)
        reference = largest.clamp(min=torch.finfo(log_sums.dtype).min)  # a column without any entry stays -inf
        total = (log_sums - reference).exp()
        with collective("merge of log-sum-exps"):
            dist.all_reduce(total, group=ranks.group)
        merged = reference + total.log()
        ctx.ranks = ranks
        ctx.save_for_backward((log_sums - merged.masked_fill(merged.isneginf(), 0.0)).exp())
        return merged[ranks.local].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The owners' gradients, each times what this rank's exponential is of the sum."""
        (weights,) = ctx.saved_tensors
        return weights * all_gather_rows(gradient, ctx.ranks), None
