"""The gathered CLIP loss: the definition's value and gradients at any world size, however ranks exchange rows."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.parity import Setting, Whole, assert_defined_by, assert_same, defined, on_ranks

CLIP = Setting({"clip": 1.0})


def cross_entropy(whole: Whole, smoothing: float = 0.0, margin: float = 0.0) -> Tensor:
    """The definition, pair by pair; a sample's other rows are no negatives of it."""
    total = torch.zeros((), dtype=torch.float64)
    count = len(whole.image)
    for rows, columns in ((whole.image, whole.text), (whole.text, whole.image)):
        for i in range(count):
            logits = torch.stack(
                [whole.scale[0] * (rows[i] @ columns[j] - (margin if i == j else 0)) for j in range(count)]
            )
            kept = [j for j in range(count) if j == i or whole.ids[j] != whole.ids[i]]
            log_sum = torch.logsumexp(logits[kept], 0)
            plain = torch.stack([whole.scale[0] * rows[i] @ columns[j] for j in range(count)])
            positive = (1 - smoothing) * logits[i] + smoothing * plain.mean()
            total = total + log_sum - positive
    return total / (2 * count)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_value_and_averaged_gradients_equal_one_process_on_the_whole_batch(world_size: int) -> None:
    assert_defined_by(CLIP, cross_entropy, (world_size,))


@pytest.mark.parametrize("similarity", [{"exchange": "ring"}, {"exchange": "gather"}])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_each_exchange_is_exact_at_any_scale(similarity: dict[str, Any], scale: float) -> None:
    assert_defined_by(replace(CLIP, similarity=similarity, scale=scale), cross_entropy, (3,))


def test_label_smoothing_spreads_over_the_global_batch() -> None:
    setting = Setting({"clip": {"label_smoothing": 0.1}})
    assert_defined_by(setting, lambda whole: cross_entropy(whole, smoothing=0.1), (1, 3))


def test_a_sample_that_is_twice_in_the_batch_is_not_its_own_negative() -> None:
    repeated = replace(CLIP, ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3))
    assert_defined_by(repeated, cross_entropy, (1, 3))


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_low_precision_wire_rounds_other_pairs_and_never_the_own(exchange: str) -> None:
    def own_pairs_exact(whole: Whole) -> Tensor:
        sent = whole.text.to(torch.bfloat16).double()
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(sent)):
            own = whole.scale[0] * whole.image[i] @ whole.text[i]
            others = [j for j in range(len(sent)) if j != i]
            for rows, columns in ((whole.image, sent), (sent, whole.image)):
                logits = [own, *(whole.scale[0] * rows[i] @ columns[j] for j in others)]
                total = total + torch.logsumexp(torch.stack(logits), 0) - own
        return total / (2 * len(sent))

    rounded = replace(CLIP, similarity={"wire": "bf16", "exchange": exchange})
    found, expected = on_ranks(rounded, 3)["value"], defined(CLIP, own_pairs_exact)["value"]
    assert abs(expected - defined(CLIP, cross_entropy)["value"]) > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_groups_of_ranks_give_the_mean_of_the_groups_losses() -> None:
    """Four ranks of 3, 1, 5 and 2 rows in groups of two: the pairs of a group are negatives of each other only."""

    def grouped(whole: Whole) -> Tensor:
        parts = []
        for rows in (slice(0, 4), slice(4, 11)):
            part = replace(whole, image=whole.image[rows], text=whole.text[rows], ids=whole.ids[rows])
            parts.append(cross_entropy(part) * (rows.stop - rows.start) / 11)
        return parts[0] + parts[1]

    assert_same(on_ranks(replace(CLIP, similarity={"group_ranks": 2}), 4), defined(CLIP, grouped))


def test_the_loss_of_identical_embeddings_is_the_log_of_the_batch() -> None:
    def identical(whole: Whole) -> Tensor:
        return cross_entropy(
            replace(whole, image=torch.ones(7, 4, dtype=torch.float64) / 2, text=torch.ones(7, 4).double() / 2)
        )

    assert defined(CLIP, lambda whole: identical(whole) + 0 * whole.image.sum())["value"].item() == pytest.approx(
        math.log(7)
    )
