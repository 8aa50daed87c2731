"""The sigmoid loss: the paper's sum over all pairs, value and gradients of towers, scale and bias."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.one_process import (
    FIXED_NEGATIVES,
    FIXTURE,
    fixed_rows,
    near_duplicates,
    pairs_like,
    value_of,
)
from tests.vlm.objectives.parity import D, Setting, Whole, assert_defined_by
from vlm.errors import UserError

SIGMOID = Setting({"sigmoid": 1.0}, scale=10.0, bias=-10.0)


def pair_by_pair(whole: Whole, extra: bool = False) -> Tensor:
    """The definition: a binary question a pair; a sample's other rows are not asked about."""
    total = torch.zeros((), dtype=torch.float64)
    scale, bias = whole.scale[0], whole.bias[0]
    for i in range(len(whole.image)):
        for j in range(len(whole.text)):
            logit = scale * (whole.image[i] @ whole.text[j]) + bias
            if i == j:
                total = total - torch.sigmoid(logit).log()
            elif whole.ids[i] != whole.ids[j]:
                total = total - torch.sigmoid(-logit).log()
        if extra:
            for rows, others in ((whole.image, fixed_rows("text", D)), (whole.text, fixed_rows("image", D))):
                for other in others:
                    total = total - torch.sigmoid(-(scale * (rows[i] @ other) + bias)).log()
    return total / len(whole.image)


def test_value_on_the_fixture() -> None:
    """-log sigmoid(9 - 10) - log sigmoid(8 - 10) + log(1 + e^(1 - 10)) + log(1 + e^(2 - 10)), over two."""
    image, text = pairs_like(torch.tensor(FIXTURE, dtype=torch.float64))
    assert value_of("sigmoid", image, text, 10.0, bias=-10.0).item() == pytest.approx(1.720324, abs=5e-7)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_value_and_averaged_gradients_equal_one_process_on_the_whole_batch(world_size: int) -> None:
    assert_defined_by(SIGMOID, pair_by_pair, (world_size,))


@pytest.mark.parametrize("changed", [{"similarity": {"exchange": "ring"}}, {"scale": 30.0, "bias": -3.0}])
def test_each_exchange_is_exact_at_any_scale_and_bias(changed: dict[str, Any]) -> None:
    assert_defined_by(replace(SIGMOID, **changed), pair_by_pair, (3,))


def test_a_sample_that_is_twice_in_the_batch_is_not_its_own_negative() -> None:
    repeated = replace(SIGMOID, bias=-2.0, ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3))
    assert_defined_by(repeated, pair_by_pair)


def test_negatives_of_providers_count_in_both_directions() -> None:
    setting = replace(SIGMOID, bias=-2.0, providers=FIXED_NEGATIVES)
    assert_defined_by(setting, lambda whole: pair_by_pair(whole, extra=True))


def test_near_duplicates_at_the_largest_scale_are_finite() -> None:
    """All logits are near 90: the value is 90 for each of 39 negatives."""
    image, text = (rows.requires_grad_() for rows in near_duplicates(40, 16, torch.float32))
    value = value_of("sigmoid", image, text, 100.0, bias=-10.0)
    value.backward()
    assert value.item() == pytest.approx(39 * 90, rel=1e-4)
    assert image.grad is not None
    assert text.grad is not None
    assert image.grad.isfinite().all()
    assert text.grad.isfinite().all()


def test_a_model_without_bias_is_refused_with_the_keys_that_give_it_one() -> None:
    image, text = pairs_like(torch.tensor(FIXTURE))
    with pytest.raises(
        UserError, match=r"no logit bias; set model.init_logit_bias \(-10 .* model.init_logit_scale: 10"
    ):
        value_of("sigmoid", image, text, 10.0)
