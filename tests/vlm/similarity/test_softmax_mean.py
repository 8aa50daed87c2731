"""Means under a softmax of the similarities: a float64 double loop's values and gradients, whatever the tiles."""

import pytest
import torch
from torch import Tensor

from vlm.distributed.row_group import RowGroup
from vlm.similarity import tiles
from vlm.similarity.entry_weights import EqualKeys
from vlm.similarity.softmax_moments import Softmax, softmax_means
from vlm.similarity.tiles import Columns


def rows_of(count: int, seed: int) -> Tensor:
    rows = torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit.requires_grad_()


def written_out(x: Tensor, y: Tensor, keys: Tensor, sharpness: float, *, constant: bool) -> tuple[Tensor, Tensor]:
    def mean(query: Tensor, others: list[Tensor]) -> Tensor:
        if not others:
            return query.new_tensor(0.25)
        z = torch.stack([query @ other for other in others])
        p = torch.softmax(sharpness * (z.detach() if constant else z), 0)
        return p @ z

    n = len(x)
    row_means = [mean(x[i], [y[j] for j in range(n) if keys[j] != keys[i]]) for i in range(n)]
    column_means = [mean(y[j], [x[i] for i in range(n) if keys[j] != keys[i]]) for j in range(n)]
    return torch.stack(row_means), torch.stack(column_means)


@pytest.mark.parametrize("sharpness", [2.0, -3.0, 0.0, 400.0])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("tile", [(512, 1024), (4, 3)])
def test_means_and_gradients_equal_a_double_loop(
    monkeypatch: pytest.MonkeyPatch, sharpness: float, constant: bool, tile: tuple[int, int]
) -> None:
    monkeypatch.setattr(tiles, "_TILE_ROWS", tile[0])
    monkeypatch.setattr(tiles, "_TILE_COLUMNS", tile[1])
    keys = torch.tensor([0, 1, 2, 3, 0, 5, 1, 7, 8])
    x, y = rows_of(9, 0), rows_of(9, 1)
    factors = torch.linspace(-1, 2, 18, dtype=torch.float64).view(2, 9)
    softmax = Softmax(sharpness, (EqualKeys(keys, keys),), constant=constant)
    results = []
    for means in (
        softmax_means(x, Columns(y), RowGroup(None, 0, (9,)), softmax, empty=0.25),
        written_out(x, y, keys, sharpness, constant=constant),
    ):
        together = torch.stack(means)
        results.append((together, *torch.autograd.grad((together * factors).sum(), (x, y))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_line_without_entries_has_the_given_mean_and_no_gradient() -> None:
    keys = torch.zeros(4, dtype=torch.int64)
    x, y = rows_of(4, 0), rows_of(4, 1)
    softmax = Softmax(1.0, (EqualKeys(keys, keys),))
    means = torch.stack(softmax_means(x, Columns(y), RowGroup(None, 0, (4,)), softmax, empty=0.25))
    assert means.tolist() == [[0.25] * 4] * 2
    assert all(not gradient.any() for gradient in torch.autograd.grad(means.sum(), (x, y)))


def test_single_precision_keeps_its_digits_at_any_sharpness() -> None:
    """A fixed reference would lose all of a row whose nearest column is far."""
    keys = torch.arange(9)
    x, y = rows_of(9, 0), rows_of(9, 1)
    softmax = Softmax(400.0, (EqualKeys(keys, keys),))
    single = softmax_means(x.float(), Columns(y.float()), RowGroup(None, 0, (9,)), softmax)
    for found, expected in zip(single, written_out(x, y, keys, 400.0, constant=False), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
