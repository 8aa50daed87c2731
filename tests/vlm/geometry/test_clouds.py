"""Statistics of two clouds: closed forms, other libraries, and double loops."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import normalize

from tests.vlm.objectives.geometry_definitions import fixture, log_mean_potential
from vlm.geometry.clouds import (
    alignment,
    centroid_gap,
    distribution_gap,
    effective_rank,
    participation_ratio,
    separability,
    spectrum,
    tolerance,
    uniformity,
)


def two_clouds(count: int, dim: int, offset: float) -> tuple[Tensor, Tensor]:
    """Unit rows; the images are drawn to one side by `offset`."""
    generator = torch.Generator().manual_seed(4)
    image, text = (torch.randn(count, dim, dtype=torch.float64, generator=generator) for _ in range(2))
    image[:, 0] += offset
    return normalize(image, dim=1), normalize(text + image, dim=1)


def test_values_on_the_fixture() -> None:
    image, text = fixture()
    assert uniformity(image, image) == pytest.approx(-4.0, abs=1e-12)
    assert uniformity(text, text) == pytest.approx(-0.16, abs=1e-12)
    assert uniformity(image, text) == pytest.approx(-1.6, abs=1e-12)
    assert alignment(image, text) == pytest.approx(0.4, abs=1e-12)
    # Centroids (0.5, 0.5) and (0.7, 0.7).
    assert centroid_gap(image, text) == pytest.approx((0.2 * math.sqrt(2), 1.0), abs=1e-12)


def test_uniformity_is_the_double_loop() -> None:
    image, text = two_clouds(9, 5, 1.0)
    for rows, others in ((image, image), (image, text)):
        assert uniformity(rows, others, 3.0) == pytest.approx(log_mean_potential(rows, others, 3.0).item(), abs=1e-12)
    assert math.isnan(uniformity(image[:1], text[:1]))


@pytest.mark.parametrize("count", [8, 40])
def test_the_distribution_gap_is_the_frechet_distance(count: int) -> None:
    """By scipy's root of a matrix; with fewer points than dimensions, after a little of the identity."""
    image, text = two_clouds(count, 12, 2.0)
    x, y = image.numpy(), text.numpy()
    x_covariance, y_covariance = (np.cov(rows.T, ddof=0) + 1e-12 * np.eye(12) for rows in (x, y))
    root = scipy.linalg.sqrtm(x_covariance)
    middle = scipy.linalg.sqrtm(root @ y_covariance @ root).real
    squared = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(x_covariance + y_covariance - 2 * middle)
    assert distribution_gap(image, text) == pytest.approx(math.sqrt(squared), rel=1e-4)


def test_the_distribution_gap_of_a_cloud_moved_is_the_move() -> None:
    rows, _ = two_clouds(30, 6, 0.0)
    moved = rows + torch.tensor([0.3, 0.0, -0.4, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert distribution_gap(rows, moved) == pytest.approx(0.5, abs=1e-7)
    assert distribution_gap(rows, rows) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("offset", [0.0, 0.7, 5.0])
def test_separability_is_near_that_of_a_logistic_regression(offset: float) -> None:
    generator = torch.Generator().manual_seed(8)
    image, text = (torch.randn(1000, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    image[:, 0] += offset
    held = np.arange(1000) % 5 == 4
    x, y = image.numpy(), text.numpy()
    known, asked = np.concatenate([x[~held], y[~held]]), np.concatenate([x[held], y[held]])
    model = LogisticRegression(C=1e3).fit(known, np.repeat([1, 0], 800))
    expected = model.score(asked, np.repeat([1, 0], 200))
    assert separability(image, text) == pytest.approx(expected, abs=0.02)


def test_separability_of_one_cloud_and_of_two_points() -> None:
    one, other = torch.zeros(20, 4), torch.zeros(20, 4)
    one[:, 1], other[:, 2] = 1.0, 1.0
    assert separability(one, other) == 1.0
    assert math.isnan(separability(one[:4], other[:4]))


def test_the_spectrum_of_points_on_axes() -> None:
    """Variances 4 : 1 on two axes of five."""
    rows = torch.zeros(4, 5, dtype=torch.float64)
    rows[0, 0], rows[1, 0], rows[2, 1], rows[3, 1] = 2.0, -2.0, 1.0, -1.0
    shares = spectrum(rows)
    assert shares.tolist() == pytest.approx([0.8, 0.2, 0, 0], abs=1e-12)
    assert effective_rank(shares) == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)), abs=1e-9)
    assert participation_ratio(shares) == pytest.approx(1 / 0.68, abs=1e-9)
    assert effective_rank(torch.full((3,), 1 / 3, dtype=torch.float64)) == pytest.approx(3)


def test_one_point_has_no_directions() -> None:
    shares = spectrum(torch.ones(6, 3))
    assert effective_rank(shares) == 0
    assert participation_ratio(shares) == 0


def test_tolerance_is_the_mean_cosine_within_classes() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    # Within class 0: <1, 2> = 0.6, <1, 4> = -1, <2, 4> = -0.6; class 1 has one row.
    assert tolerance(rows, torch.tensor([0, 0, 1, 0])) == pytest.approx(-1 / 3, abs=1e-12)
    assert math.isnan(tolerance(rows, torch.arange(4)))
