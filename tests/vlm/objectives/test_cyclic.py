"""Cyclic consistency and cross-correlation: sums over all pairs written out, at any number of ranks."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.geometry_definitions import fixture
from tests.vlm.objectives.one_process import near_duplicates, value_of
from tests.vlm.objectives.parity import Setting, Whole, assert_defined_by


def cyclic(whole: Whole, cross_modal: float = 0.25, in_modal: float = 0.25) -> Tensor:
    """Both double sums."""
    x, y, count = whole.image, whole.text, len(whole.image)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            total = total + cross_modal * (x[i] @ y[j] - x[j] @ y[i]) ** 2
            total = total + in_modal * (x[i] @ x[j] - y[i] @ y[j]) ** 2
    return total / count


def cross_correlation(whole: Whole, standardize: bool = True) -> Tensor:
    """Every entry of C."""
    x, y = whole.image, whole.text
    if standardize:
        x, y = ((rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt() for rows in (x, y))
    total = torch.zeros((), dtype=torch.float64)
    for k in range(x.shape[1]):
        for m in range(y.shape[1]):
            entry = (x[:, k] * y[:, m]).sum() / len(x)
            total = total + ((entry - 1) ** 2 if k == m else 5e-3 * entry**2)
    return 0.025 * total


def test_cyclic_values_on_the_fixture() -> None:
    """The fixture's cross-modal similarities are symmetric; <x_1, x_2> is 0 and <y_1, y_2> is 0.96."""
    assert value_of("cyclic", *fixture(), 5.0, cross_modal=1, in_modal=0).item() == pytest.approx(0, abs=1e-12)
    assert value_of("cyclic", *fixture(), 5.0, cross_modal=0, in_modal=1).item() == pytest.approx(0.9216, abs=1e-12)
    image, text = fixture()
    lopsided = value_of("cyclic", image, text @ text.new_tensor([[1.0, 0.5], [0.0, 1.0]]), 5.0, in_modal=0)
    # <x_1, y_2> = 0.6, <x_2, y_1> = 1.0
    assert lopsided.item() == pytest.approx(0.25 * 2 * 0.4**2 / 2, abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"cross_modal": 1.0, "in_modal": 0.0}, {"cross_modal": 0.0, "in_modal": 1.0}])
def test_cyclic_is_the_double_sum_over_the_global_batch(options: dict[str, float]) -> None:
    assert_defined_by(Setting({"cyclic": options}), partial(cyclic, **options), world_sizes=(1, 2, 3))  # type: ignore[arg-type]


def test_cyclic_keeps_small_differences_of_large_traces_in_fp32() -> None:
    """All similarities are near 1 and differ by 1e-4; the traces are 1,600."""
    image, text = near_duplicates(40, 16, torch.float32)
    x, y = image.double(), text.double()
    expected = (x @ y.T - y @ x.T).square().sum() / 4 + (x @ x.T - y @ y.T).square().sum() / 4
    assert value_of("cyclic", image, text, 5.0).item() == pytest.approx(expected.item() / 40, rel=1e-4)


def test_cross_correlation_is_nothing_where_dimensions_are_paired_and_apart() -> None:
    rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert value_of("cross_correlation", rows, rows, 5.0, standardize=False).item() == 0
    assert value_of("cross_correlation", rows, rows, 5.0).item() == pytest.approx(0, abs=1e-10)


def test_cross_correlation_does_not_see_a_batch_repeated() -> None:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(9, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    once = value_of("cross_correlation", image, text, 5.0).item()
    assert once > 0.01
    twice = value_of("cross_correlation", image.repeat(2, 1), text.repeat(2, 1), 5.0).item()
    assert twice == pytest.approx(once, rel=1e-12)


@pytest.mark.parametrize("standardize", [True, False])
def test_cross_correlation_is_that_of_the_global_batch(standardize: bool) -> None:
    setting = Setting({"cross_correlation": {"standardize": standardize}})
    assert_defined_by(setting, partial(cross_correlation, standardize=standardize), world_sizes=(1, 2, 3))
