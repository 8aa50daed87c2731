"""Entries that reach a row's threshold are the row's largest share of entries, by whatever product it is computed."""

import math

import pytest
import torch

from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.thresholds import upper_thresholds


def rows_and_columns(num_rows: int, num_columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    drawn = torch.randn(num_rows + num_columns, 24, dtype=torch.float64, generator=generator)
    rows, columns = (drawn / drawn.norm(dim=1, keepdim=True)).to(dtype).split([num_rows, num_columns])
    return rows, columns


@pytest.mark.parametrize("share", [0.001, 0.07, 0.5, 0.999])
def test_as_many_entries_reach_it_as_the_share_says(share: float) -> None:
    """More rows than fit one block of 2^20 entries; counted by a product of the other order and precision."""
    rows, columns = rows_and_columns(1100, 2000, torch.float32)
    thresholds = upper_thresholds(14.3 * rows, columns, share)
    products = (columns.double() @ (14.3 * rows).double().T).T
    reached = (products >= thresholds[:, None]).sum(1)
    expected = math.ceil(round(share * 2000, 6))
    # Neighbours nearer than fp32 can tell apart count together.
    assert (reached >= expected).all()
    assert (reached > expected).float().mean() < 0.05
    assert (reached <= expected + 2).all()


def test_it_lies_midway_between_the_last_that_counts_and_the_next() -> None:
    rows = torch.ones(1, 1, dtype=torch.float64)
    columns = torch.tensor([[0.1], [0.9], [0.5], [0.3], [0.8]], dtype=torch.float64)
    for share, expected in ((0.2, 0.85), (0.21, 0.65), (0.4, 0.65), (0.6, 0.4), (0.8, 0.2), (1.0, -math.inf)):
        assert upper_thresholds(rows, columns, share).item() == pytest.approx(expected)


def test_a_share_that_is_a_whole_number_of_entries_is_not_rounded_up() -> None:
    """0.07 x 100 is a little above 7 in floating point."""
    columns = torch.arange(100, dtype=torch.float64)[:, None].contiguous()
    assert upper_thresholds(torch.ones(1, 1, dtype=torch.float64), columns, 0.07).item() == 92.5


def test_entries_left_out_do_not_count_nor_are_they_counted() -> None:
    """A row of which all is left out has nothing to choose from."""
    rows = torch.ones(3, 1, dtype=torch.float64)
    columns = torch.tensor([[0.9], [0.7], [0.5], [0.3]], dtype=torch.float64)
    weights = (EqualKeys(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2, 2])),)
    expected = torch.tensor([0.4, 0.6, -math.inf], dtype=torch.float64)  # of 3, 4 and 1 entries: after 2, 2 and 1
    torch.testing.assert_close(upper_thresholds(rows, columns, 0.5, weights), expected)
    none = (EqualKeys(torch.tensor([2, 2, 2]), torch.tensor([2, 2, 2, 2])),)
    assert upper_thresholds(rows, columns, 0.5, none).isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_entries_are_on_one_side(dtype: torch.dtype) -> None:
    """Each column three times: with the second largest the third comes in, though rounding tells them apart."""
    rows, columns = rows_and_columns(50, 40, dtype)
    copies = columns.repeat(3, 1)
    thresholds = upper_thresholds(14.3 * rows, copies, 2 / 120)
    for products in ((14.3 * rows) @ copies.T, (copies @ (14.3 * rows).T).T, 14.3 * (rows @ copies.T)):
        assert ((products >= thresholds[:, None]).sum(1) == 3).all()


def test_low_precision_products_choose_as_the_tiles_do() -> None:
    """The entries of a bf16 product that reach it: no fewer than the share, and no more than its ties."""
    rows, columns = rows_and_columns(64, 500, torch.float32)
    thresholds = upper_thresholds(14.3 * rows, columns, 0.1, matmul_dtype=torch.bfloat16)
    assert thresholds.dtype == torch.float32
    products = ((14.3 * rows).bfloat16() @ columns.bfloat16().T).float()
    reached = (products >= thresholds[:, None]).sum(1)
    last = products.topk(50, dim=1).values[:, -1:]
    assert (reached >= 50).all()
    assert (reached <= (products >= last * (1 - 2**-6)).sum(1)).all()


def test_no_rows_have_no_thresholds() -> None:
    rows, columns = rows_and_columns(1, 5, torch.float32)
    assert upper_thresholds(rows[:0], columns, 0.5).shape == (0,)
