"""The nearest columns of each row, against sorting every row in float64."""

import pytest
import torch

from vlm.similarity import top_k as module
from vlm.similarity.entry_weights import AtLeast, EqualKeys
from vlm.similarity.top_k import top_negatives


@pytest.mark.parametrize("block", [4, 256])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_largest_similarities_of_other_samples(block: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_BLOCK", block)
    rows, columns = torch.randn(10, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    row_keys, column_keys = torch.arange(10), torch.arange(20)
    values, places = top_negatives(rows, columns, count, (EqualKeys(row_keys, column_keys),))
    for i in range(10):
        nearest = sorted(
            ((float(rows[i] @ columns[j]), j) for j in range(20) if row_keys[i] != column_keys[j]), reverse=True
        )[:count]
        found = values[i].isfinite()
        assert found.sum() == len(nearest)
        assert places[i][found].tolist() == [j for _, j in nearest]
        torch.testing.assert_close(values[i][found], torch.tensor([s for s, _ in nearest], dtype=torch.float64))
        assert values[i][~found].isneginf().all()


def test_all_columns_where_more_are_asked_for_and_no_gradient() -> None:
    rows = torch.randn(3, 4, requires_grad=True)
    values, places = top_negatives(rows, torch.randn(2, 4), 5)
    assert values.shape == places.shape == (3, 2)
    assert not values.requires_grad


def test_entries_that_do_not_count_come_last() -> None:
    rows, columns = torch.ones(1, 1), torch.tensor([[3.0], [1.0], [2.0]])
    values, places = top_negatives(rows, columns, 3, (AtLeast(torch.tensor([2.5])),))
    assert values[0, 0] == 3
    assert places[0, 0] == 0
    assert values[0, 1:].isneginf().all()
