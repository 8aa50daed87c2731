"""The precision in which pairs are compared, where a recipe leaves it open."""

from typing import Any

import pytest

from vlm.training.config import TrainingConfig


@pytest.mark.parametrize(
    ("keys", "product"),
    [
        ({}, "fp32"),
        ({"precision": "bf16"}, "bf16"),
        ({"precision": "bf16", "objective": {"sigmoid": 1, "uniformity": 0.1}}, "bf16"),
        ({"precision": "bf16", "objective": {"clip": 1, "hard": 1}}, "fp32"),  # rounding would pick other negatives
        ({"precision": "bf16", "similarity": {"product": "fp32"}}, "fp32"),
        ({"similarity": {"product": "bf16"}, "objective": {"hard": 1}}, "bf16"),
    ],
)
def test_products_are_in_bf16_where_the_towers_are_and_nothing_is_picked(keys: dict[str, Any], product: str) -> None:
    assert TrainingConfig.model_validate(keys).comparison.product == product
