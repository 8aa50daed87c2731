"""Weights of negatives at three temperatures, and histograms of scores."""

import math

import pytest
import torch

from vlm.geometry.negatives import hardness, score_histograms


@pytest.mark.parametrize(
    ("temperature", "weights"),
    [(0.07, (0.9967, 0.0033, 0.0000)), (0.3, (0.7501, 0.1977, 0.0521)), (1.0, (0.4718, 0.3162, 0.2120))],
)
def test_weights_at_three_temperatures(temperature: float, weights: tuple[float, ...]) -> None:
    """One anchor with a positive at 0.7 and negatives at 0.5, 0.1, -0.3."""
    found = hardness(torch.tensor([[0.7, 0.5, 0.1, -0.3]], dtype=torch.float64), 1 / temperature)
    assert found.hardest == pytest.approx(weights[0], abs=5e-5)
    assert found.entropy == pytest.approx(-sum(w * math.log(w) for w in weights if w), abs=5e-4)


def test_equal_negatives_push_alike() -> None:
    found = hardness(torch.eye(5, dtype=torch.float64), 100.0)
    assert found.entropy == pytest.approx(math.log(4))
    assert found.hardest == pytest.approx(0.25)
    assert math.isnan(hardness(torch.ones(1, 1), 1.0).entropy)


def test_histograms_of_positives_and_hardest_negatives() -> None:
    similarities = torch.tensor([[1.0, 0.2, -0.9], [-1.0, 0.1, -0.95], [0.3, 0.3, -0.7]])
    positives, hardest = score_histograms(similarities, 4)  # from -1, -0.5, 0, 0.5
    assert positives.tolist() == [1, 0, 1, 1]
    assert hardest.tolist() == [1, 0, 2, 0]
