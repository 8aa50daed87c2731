"""Weights of entries: which are left out, whatever the tile and however they are found."""

import pytest
import torch
from torch import Tensor

from vlm.similarity.entry_weights import AtLeast, EntryWeights, EqualKeys

ROWS, COLUMNS = 9, 14


def counted(weights: EntryWeights, similarities: Tensor, rows: slice, columns: slice) -> Tensor:
    """1 where an entry of the tile is left in, 0 where it is left out; both ways of asking must agree."""
    tile = similarities[rows, columns]
    logits, values = tile.clone(), torch.ones_like(tile)
    weights.add_logs(logits, tile, rows, columns)
    weights.multiply(values, tile, rows, columns)
    left_in = values == 1
    assert (values[~left_in] == 0).all()
    assert torch.equal(logits[left_in], tile[left_in])
    assert logits[~left_in].isneginf().all()
    return left_in


TILES = [(slice(0, ROWS), slice(0, COLUMNS)), (slice(0, 4), slice(3, 9)), (slice(4, 9), slice(9, 14))]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("num_row_keys", "num_column_keys", "listed"), [(9, 14, True), (5, 14, True), (2, 2, True), (1, 1, False)]
)
def test_entries_of_equal_keys(
    keep: bool, num_row_keys: int, num_column_keys: int, listed: bool, tile: tuple[slice, slice]
) -> None:
    """None, few and many equal ones; keys are any 64-bit numbers, in no order."""
    far = 2**62
    row_keys = far - torch.arange(ROWS) % num_row_keys
    column_keys = far - torch.arange(COLUMNS).flip(0) % num_column_keys
    weights = EqualKeys(row_keys, column_keys, keep=keep)
    assert (weights.listed is not None) == listed
    expected = torch.tensor([[bool(i == j) == keep for j in column_keys] for i in row_keys])
    found = counted(weights, torch.randn(ROWS, COLUMNS), *tile)
    assert torch.equal(found, expected[tile])


@pytest.mark.parametrize(("rows", "columns"), TILES)
def test_entries_that_reach_a_threshold(rows: slice, columns: slice) -> None:
    """The threshold itself is reached; those of rows and of columns are their own."""
    similarities = torch.randn(ROWS, COLUMNS)
    row_thresholds, column_thresholds = similarities[:, 5].clone(), similarities[3].clone()
    for weights, least in (
        (AtLeast(row_thresholds), row_thresholds[:, None]),
        (AtLeast(column_thresholds, by_column=True), column_thresholds[None, :]),
    ):
        expected = similarities.ge(least)
        assert torch.equal(counted(weights, similarities, rows, columns), expected[rows, columns])


def test_weights_that_only_know_their_logarithm_multiply_by_it() -> None:
    class Halved(EntryWeights):
        def add_logs(self, logits: Tensor, tile: Tensor, rows: slice, columns: slice) -> None:
            logits.sub_(torch.full_like(tile, 2.0).log())

    values = torch.tensor([[3.0, 4.0]])
    Halved().multiply(values, values.clone(), slice(0, 1), slice(0, 2))
    torch.testing.assert_close(values, torch.tensor([[1.5, 2.0]]))
