"""The clouds of a model that has collapsed, and of one with a single dimension, can be drawn."""

import numpy as np
import pytest

from eval.geometry_plots import _projections


@pytest.mark.parametrize("noise", [0.0, 1e-30, 1e-9])
def test_one_point_has_no_neighbours(noise: float) -> None:
    rows = np.eye(8)[0] + noise * np.random.default_rng(0).normal(size=(40, 8))
    placed, shares, neighbours = _projections(rows)
    assert neighbours is None
    assert shares == (0.0, 0.0)
    assert not placed.any()


def test_rows_of_one_dimension_and_two_points_are_projected() -> None:
    signs = np.where(np.arange(40) % 3 == 0, 1.0, -1.0)[:, None]
    for rows in (signs, np.concatenate([signs, np.zeros((40, 7))], axis=1)):
        placed, shares, neighbours = _projections(rows)
        assert shares == pytest.approx((1.0, 0.0))
        assert np.ptp(placed[:, 0]) == pytest.approx(2.0)
        assert neighbours is not None
        assert np.isfinite(neighbours).all()
