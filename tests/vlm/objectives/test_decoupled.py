"""Decoupled contrastive learning: the paper's two forms, and what decoupling means."""

import math
from dataclasses import replace
from functools import partial
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

DCL = Setting({"decoupled": 1.0})
DCLW = {"weighting": "von_mises"}


def definition(
    whole: Whole, sigma: float | None = None, detach: bool = False, extra: bool = False, both: tuple[int, ...] = (0, 1)
) -> Tensor:
    """Row by row; `both` chooses directions: 0 images against texts, 1 texts against images."""
    count = len(whole.image)
    total = torch.zeros((), dtype=torch.float64)
    positives = torch.stack([whole.image[i] @ whole.text[i] for i in range(count)])
    weights = torch.ones(count, dtype=torch.float64)
    if sigma is not None:
        ratios = (positives / sigma).exp()
        weights = 2 - ratios / ratios.mean()
        weights = weights.detach() if detach else weights
    for direction in both:
        rows, columns = (whole.image, whole.text) if direction == 0 else (whole.text, whole.image)
        more = fixed_rows("text" if direction == 0 else "image", D) if extra else columns[:0]
        for i in range(count):
            negatives = [columns[j] for j in range(count) if whole.ids[j] != whole.ids[i]] + list(more)
            logits = torch.stack([whole.scale[0] * (rows[i] @ other) for other in negatives])
            total = total - weights[i] * whole.scale[0] * positives[i] + logits.exp().sum().log()
    return total / (len(both) * count)


def test_value_on_the_fixture() -> None:
    """(-1.8 + 0.2 - 1.6 + 0.4) / 2 from images to texts, and the same from texts to images."""
    image, text = pairs_like(torch.tensor(FIXTURE, dtype=torch.float64))
    assert value_of("decoupled", image, text, 2.0).item() == pytest.approx(-1.4, abs=1e-12)


def test_weighted_value_on_the_fixture() -> None:
    """Weights 0.900332 and 1.099668; both directions have the same positives and the same negatives."""
    image, text = pairs_like(torch.tensor(FIXTURE, dtype=torch.float64))
    value = value_of("decoupled", image, text, 2.0, **DCLW).item()  # type: ignore[arg-type]
    assert value == pytest.approx(-1.390033, abs=5e-7)
    assert value == pytest.approx((-0.900332 * 1.8 + 0.2 - 1.099668 * 1.6 + 0.4) / 2, abs=1e-6)


def test_it_is_info_nce_plus_the_logarithm_of_what_the_positive_leaves() -> None:
    """L_DC = L_NCE + mean log(1 - p_ii), the p of a dense softmax."""
    similarities = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    image, text = pairs_like(similarities)
    expected = 0.0
    for logits in (similarities / 0.5, similarities.T / 0.5):
        positive = torch.softmax(logits, 1).diagonal()
        expected += (-positive.log() + (1 - positive).log()).mean().item() / 2
    assert value_of("decoupled", image, text, 2.0).item() == pytest.approx(expected, rel=1e-12)


def test_the_pull_on_a_positive_pair_does_not_fade() -> None:
    """d value / d s_ii = -1 / (temperature N) whatever the negatives are."""
    similarities = torch.tensor(FIXTURE, dtype=torch.float64, requires_grad=True)
    image, text = pairs_like(similarities)
    value_of("decoupled", image, text, 1 / 0.5).backward()
    assert similarities.grad is not None
    torch.testing.assert_close(similarities.grad.diagonal() * 2, torch.full((2,), -2.0, dtype=torch.float64))


@pytest.mark.parametrize("similarity", [{"exchange": "gather"}, {"exchange": "ring"}])
def test_value_and_averaged_gradients_equal_one_process_on_the_whole_batch(similarity: dict[str, Any]) -> None:
    assert_defined_by(replace(DCL, similarity=similarity), definition)


@pytest.mark.parametrize("detach", [False, True])
def test_weights_are_relative_to_the_mean_of_the_global_batch(detach: bool) -> None:
    setting = Setting({"decoupled": {**DCLW, "detach_weights": detach}})
    assert_defined_by(setting, partial(definition, sigma=0.5, detach=detach))


def test_a_narrow_weighting_does_not_overflow() -> None:
    """exp(s / 0.001) is beyond float64; the nearest pair has all the mass, N of it: weight 2 - N, the others 2."""
    image, text = pairs_like(torch.tensor(FIXTURE, dtype=torch.float64))
    value = value_of("decoupled", image, text, 2.0, sigma=0.001, **DCLW).item()  # type: ignore[arg-type]
    assert value == pytest.approx((0 * 1.8 + 0.2 - 2 * 1.6 + 0.4) / 2, abs=1e-12)


def test_repeated_samples_and_negatives_of_providers() -> None:
    setting = replace(DCL, ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3), providers=FIXED_NEGATIVES)
    assert_defined_by(setting, partial(definition, extra=True))


def test_a_pair_without_negatives_attracts_only() -> None:
    image, text = pairs_like(torch.tensor([[0.3]], dtype=torch.float64))
    text.requires_grad_()
    value = value_of("decoupled", image, text, 10.0)
    value.backward()
    assert value.item() == pytest.approx(-3.0)
    assert text.grad is not None
    assert text.grad.item() == pytest.approx(-10.0)


def test_near_duplicates_at_the_largest_scale_are_finite() -> None:
    """Positives and negatives are alike: the logarithm of 39 is left of 100 against 100."""
    image, text = (rows.requires_grad_() for rows in near_duplicates(40, 16, torch.float32))
    value = value_of("decoupled", image, text, 100.0)
    value.backward()
    assert value.item() == pytest.approx(math.log(39), abs=1e-3)
    assert image.grad is not None
    assert image.grad.isfinite().all()
