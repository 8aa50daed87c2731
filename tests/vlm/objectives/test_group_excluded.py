"""Negatives of other groups only: the definition by label and by caption, and its two limits."""

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
from vlm.errors import UserError

BY_LABEL = Setting({"group_excluded": {"by": "label"}})


def definition(whole: Whole, by: str, extra: bool = False) -> Tensor:
    """Row by row over a list of columns: the own pair, then the negatives."""
    keys = {"label": whole.labels, "caption": whole.captions}[by]
    count = len(whole.image)
    total = torch.zeros((), dtype=torch.float64)
    for rows, columns, others in ((whole.image, whole.text, "text"), (whole.text, whole.image, "image")):
        more = fixed_rows("text" if others == "text" else "image", D) if extra else columns[:0]
        for i in range(count):
            apart = [j for j in range(count) if keys[j] != keys[i] and whole.ids[j] != whole.ids[i]]
            logits = [whole.scale[0] * (rows[i] @ column) for column in [columns[i], *columns[apart], *more]]
            total = total - torch.stack(logits).softmax(0)[0].log()
    return total / (2 * count)


@pytest.mark.parametrize("by", ["label", "caption"])
@pytest.mark.parametrize("similarity", [{"exchange": "gather"}, {"exchange": "ring"}])
def test_value_and_averaged_gradients_equal_one_process_on_the_whole_batch(by: str, similarity: dict[str, Any]) -> None:
    setting = Setting({"group_excluded": {"by": by}}, similarity=similarity)
    assert_defined_by(setting, partial(definition, by=by), (1, 3) if similarity["exchange"] == "gather" else (3,))


def test_repeated_samples_and_negatives_of_providers() -> None:
    setting = replace(BY_LABEL, ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3), providers=FIXED_NEGATIVES)
    assert_defined_by(setting, partial(definition, by="label", extra=True))


def test_with_all_groups_distinct_it_is_the_symmetric_cross_entropy() -> None:
    similarities = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target = torch.arange(6)
    expected = (cross_entropy(similarities * 3, target) + cross_entropy(similarities.T * 3, target)) / 2
    value = value_of("group_excluded", *pairs_like(similarities), 3.0, labels=torch.arange(6) * 7)
    torch.testing.assert_close(value, expected)


def test_with_one_group_for_all_nothing_is_left_to_learn() -> None:
    similarities = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    similarities.requires_grad_()
    value = value_of("group_excluded", *pairs_like(similarities), 3.0, labels=torch.full((6,), 4))
    value.backward()
    assert value.item() == 0.0
    assert similarities.grad is not None
    assert not similarities.grad.any()


def test_two_pairs_of_each_group_among_identical_rows() -> None:
    """Four pairs, all similarities equal: one of three columns is right."""
    value = value_of("group_excluded", *pairs_like(torch.ones(4, 4)), 3.0, labels=torch.tensor([0, 1, 0, 1]))
    assert value.item() == pytest.approx(math.log(3))


def test_near_duplicates_at_the_largest_scale_are_finite() -> None:
    image, text = (rows.requires_grad_() for rows in near_duplicates(40, 16, torch.float32))
    value = value_of("group_excluded", image, text, 100.0, labels=torch.arange(40) // 4)
    value.backward()
    assert value.item() == pytest.approx(math.log(37), abs=1e-3)
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_data_without_labels_is_refused() -> None:
    with pytest.raises(UserError, match="label"):
        value_of("group_excluded", *pairs_like(torch.ones(4, 4)), 3.0)
