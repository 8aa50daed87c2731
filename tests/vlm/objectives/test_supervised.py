"""The supervised contrastive loss equals its definition at any world size, and NT-Xent where all labels differ."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.parity import N, Setting, Whole, assert_defined_by, unit
from vlm.objectives.objective import Objective
from vlm.objectives.pairs import pair_up
from vlm.objectives.providers.extra_negatives import SharedNegatives
from vlm.objectives.terms.supervised import Supervised, supervised


def written_out(whole: Whole, keys: Tensor, scale: Tensor) -> Tensor:
    """Equation 2 of the paper, anchor by anchor."""
    views, labels = torch.cat([whole.image, whole.text]), keys.repeat(2)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(views)):
        others = [k for k in range(len(views)) if k != i]
        log_sum = torch.logsumexp(torch.stack([scale * views[i] @ views[k] for k in others]), 0)
        positives = [p for p in others if labels[p] == labels[i]]
        total = total - sum(scale * views[i] @ views[p] - log_sum for p in positives) / len(positives)
    return total / len(views)


@pytest.mark.parametrize("similarity", [{}, {"exchange": "ring"}])
def test_value_and_averaged_gradients_equal_the_definition_on_the_whole_batch(similarity: dict[str, Any]) -> None:
    setting = Setting({"supervised": 1.0}, similarity=similarity)
    assert_defined_by(setting, lambda whole: written_out(whole, whole.labels, torch.tensor(10.0).double()))


@pytest.mark.parametrize("by", ["label", "caption"])
def test_with_the_models_own_temperature(by: str) -> None:
    setting = Setting({"supervised": {"temperature": None, "by": by}})
    assert_defined_by(
        setting,
        lambda whole: written_out(whole, whole.labels if by == "label" else whole.captions, whole.scale[0]),
    )


def test_distinct_labels_are_nt_xent_with_two_views() -> None:
    """Against torch's cross-entropy over all 2N views but one's own."""

    def nt_xent(whole: Whole) -> Tensor:
        views = torch.cat([whole.image, whole.text])
        logits = (views @ views.T / 0.07).fill_diagonal_(float("-inf"))
        partners = torch.arange(2 * N).roll(N)
        return torch.nn.functional.cross_entropy(logits, partners)

    setting = Setting({"supervised": {"temperature": 0.07}}, labels=tuple(range(N)))
    assert_defined_by(setting, nt_xent)


def value_of(image: Tensor, text: Tensor, labels: Tensor) -> float:
    objective = Objective({"supervised": Supervised()})
    return objective.evaluate(outputs_of(image, text, image.new_ones(1)), batch_of(len(labels), labels=labels))[
        0
    ].item()


@pytest.mark.parametrize("classes", [1, 3])
def test_equal_similarities_cost_the_log_of_all_others(classes: int) -> None:
    rows = torch.ones(7, 4, dtype=torch.float64) / 2
    assert value_of(rows, rows, torch.arange(7) % classes) == pytest.approx(math.log(13), abs=1e-12)


def test_aligned_pairs_keep_their_digits_in_single_precision() -> None:
    """The loss of perfectly aligned pairs is log(1 + 22 exp(-10)): 1e-3, from numbers that are near 10."""
    rows = torch.eye(12)
    assert value_of(rows, rows, torch.arange(12)) == pytest.approx(math.log1p(22 * math.exp(-10)), rel=2e-6)


def test_extra_negatives_join_the_denominators_and_a_spread_moves_the_partner_alone() -> None:
    x, y, more_images, more_texts = (
        unit(torch.randn(4, 3, generator=torch.Generator().manual_seed(k))) for k in range(4)
    )
    labels, spread = torch.tensor([0, 1, 0, 2]), torch.tensor([1.5, 1.0, 2.0, 1.2])
    pairs = pair_up(x, y)
    extra = SharedNegatives(pairs, {"image": more_images, "text": more_texts}, (torch.arange(10, 14),))
    pairs = replace(pairs, extra=(extra,), positive_spread=spread)
    found = supervised(pairs, torch.tensor([5.0]), labels)
    views, view_labels, losses = torch.cat([x, y]), labels.repeat(2), []
    for i in range(8):
        partner = (i + 4) % 8
        similarities = views @ views[i]
        length = spread[i % 4]
        similarities[partner] = (2 * length**2 - 2 * length + 1) * similarities[partner] + 2 * length * (1 - length)
        others = torch.arange(8) != i
        more = (more_texts if i < 4 else more_images) @ views[i]
        log_sum = torch.logsumexp(5 * torch.cat([similarities[others], more]), 0)
        losses.append((log_sum - 5 * similarities[others & (view_labels == view_labels[i])]).mean())
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
