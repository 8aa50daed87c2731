"""Log-sum-exp over the lines of a pair matrix as it is defined: entry by entry, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Rows, columns, and a scale a line, as leaves in float64; which entries count for rows and for columns."""

    rows: Tensor
    columns: Tensor
    row_scale: Tensor
    column_scale: Tensor
    row_counts: Tensor
    column_counts: Tensor

    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """New leaves of the same numbers."""
        parts = (self.rows, self.columns, self.row_scale, self.column_scale)
        rows, columns, row_scale, column_scale = (part.detach().clone().requires_grad_() for part in parts)
        return rows, columns, row_scale, column_scale


def problem(num_rows: int, num_columns: int, scale: float, dim: int = 5) -> Problem:
    """Unit rows and columns; scales between `scale` / 2 and `scale`; every entry counts."""
    generator = torch.Generator().manual_seed(num_rows)
    rows, columns = (
        torch.randn(size, dim, dtype=torch.float64, generator=generator) for size in (num_rows, num_columns)
    )
    row_scale, column_scale = (
        scale * (1 + torch.rand(size, dtype=torch.float64, generator=generator)) / 2 for size in (num_rows, num_columns)
    )
    everything = torch.ones(num_rows, num_columns, dtype=torch.bool)
    rows, columns = (part / part.norm(dim=1, keepdim=True) for part in (rows, columns))
    return Problem(rows, columns, row_scale, column_scale, everything, everything)


def row_sums(rows: Tensor, columns: Tensor, scale: Tensor, counts: Tensor) -> Tensor:
    """log sum_j exp(scale_i <x_i, y_j>) of each row over the entries that count; -inf where none does."""
    results = []
    for i in range(len(rows)):
        logits = [scale[i] * (rows[i] @ columns[j]) for j in range(len(columns)) if counts[i, j]]
        results.append(torch.logsumexp(torch.stack(logits), 0) if logits else rows.new_tensor(float("-inf")))
    return torch.stack(results)


def gradients(results: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a sum of all results with weights that differ; lines without entries are asked for a gradient as well."""
    results = tuple(result for result in results if result.requires_grad)  # a line of constants has no graph
    weights = [torch.linspace(0.5, 1.5, len(result), dtype=result.dtype) for result in results]
    found = torch.autograd.grad(results, leaves, weights, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in zip(found, leaves, strict=True)
    )


def defined(of: Problem) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """Results over rows and over columns, and the gradients at the leaves."""
    leaves = of.leaves()
    rows, columns, row_scale, column_scale = leaves
    results = (
        row_sums(rows, columns, row_scale, of.row_counts),
        row_sums(columns, rows, column_scale, of.column_counts.T),
    )
    return (results[0].detach(), results[1].detach()), gradients(results, leaves)
