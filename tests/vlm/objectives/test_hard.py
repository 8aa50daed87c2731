"""The hard contrastive loss: each row's hardest negatives, chosen among the whole batch's."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.vlm.objectives.one_process import FIXED_NEGATIVES, fixed_rows, near_duplicates, pairs_like, value_of
from tests.vlm.objectives.parity import D, Setting, Whole, assert_defined_by

HARD = Setting({"hard": {"hardest": 0.3}})


def definition(whole: Whole, hardest: float, extra: bool = False) -> Tensor:
    """Row by row: the own pair, then the first of the sorted negatives, then what providers add."""
    count = len(whole.image)
    total = torch.zeros((), dtype=torch.float64)
    for rows, columns, others in ((whole.image, whole.text, "text"), (whole.text, whole.image, "image")):
        more = fixed_rows("text" if others == "text" else "image", D) if extra else columns[:0]
        for i in range(count):
            negatives = [whole.scale[0] * (rows[i] @ columns[j]) for j in range(count) if whole.ids[j] != whole.ids[i]]
            negatives = sorted(negatives, key=lambda logit: -logit.item())[: math.ceil(hardest * len(negatives))]
            positive = whole.scale[0] * (rows[i] @ columns[i])
            logits = [positive, *negatives, *(whole.scale[0] * (rows[i] @ other) for other in more)]
            total = total - torch.stack(logits).softmax(0)[0].log()
    return total / (2 * count)


@pytest.mark.parametrize(("hardest", "kept"), [(0.3, [0.5]), (0.4, [0.5, 0.1]), (1.0, [0.5, 0.1, -0.3])])
def test_closed_form_of_one_row(hardest: float, kept: list[float]) -> None:
    """Positive 0.7, negatives 0.5, 0.1 and -0.3, in both directions; the other rows are as this one."""
    row = torch.tensor([0.7, 0.5, 0.1, -0.3], dtype=torch.float64)
    similarities = torch.stack([row.roll(i) for i in range(4)])
    value = value_of("hard", *pairs_like(similarities), 1 / 0.3, hardest=hardest)
    expected = math.log1p(sum(math.exp((negative - 0.7) / 0.3) for negative in kept))
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_value_and_averaged_gradients_equal_one_process_on_the_whole_batch(world_size: int) -> None:
    assert_defined_by(HARD, partial(definition, hardest=0.3), (world_size,))


@pytest.mark.parametrize(
    "changed", [{"similarity": {"exchange": "ring"}}, {"scale": 100.0}, {"scale": 0.5}, {"terms": {"hard": {}}}]
)
def test_each_exchange_is_exact_at_any_scale(changed: dict[str, Any]) -> None:
    share = 0.1 if "terms" in changed else 0.3
    assert_defined_by(replace(HARD, **changed), partial(definition, hardest=share), (3,))


def test_repeated_samples_and_negatives_of_providers() -> None:
    setting = replace(HARD, ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3), providers=FIXED_NEGATIVES)
    assert_defined_by(setting, partial(definition, hardest=0.3, extra=True))


def test_with_all_negatives_it_is_the_symmetric_cross_entropy() -> None:
    similarities = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target = torch.arange(6)
    expected = (cross_entropy(similarities * 3, target) + cross_entropy(similarities.T * 3, target)) / 2
    torch.testing.assert_close(value_of("hard", *pairs_like(similarities), 3.0, hardest=1.0), expected)


def test_negatives_that_tie_with_the_last_all_count() -> None:
    """Four identical rows: the hardest of three is all three."""
    assert value_of("hard", *pairs_like(torch.ones(4, 4)), 3.0, hardest=0.1).item() == pytest.approx(math.log(4))


def test_near_duplicates_at_the_largest_scale_are_finite() -> None:
    """Rounding is larger than all differences: the hardest 8 of 39 negatives tie with the others and the positive."""
    image, text = (rows.requires_grad_() for rows in near_duplicates(40, 16, torch.float32))
    value = value_of("hard", image, text, 100.0, hardest=0.2)
    value.backward()
    assert value.item() == pytest.approx(math.log(40), abs=1e-3)
    assert image.grad is not None
    assert image.grad.isfinite().all()
