"""Feature transformation: the paper's closed forms, and its definition at any world size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.parity import N, Setting, Whole, assert_defined_by, assert_same, on_ranks
from vlm.objectives.counter_rng import symmetric_beta
from vlm.objectives.pairs import pair_up
from vlm.objectives.providers.extra_negatives import SharedNegatives
from vlm.objectives.providers.feature_transform import interpolate, permutation

TRANSFORMED = Setting(
    {"clip": 1.0},
    {"feature_transform": {}},
    ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3),  # two samples are there twice
)


def definition(whole: Whole, *, positive: bool = True, negative: bool = True, unit_norm: bool = False) -> Tensor:
    """The clip loss with each positive from its extrapolated pair, and mixtures of columns one by one."""
    spreads = 1 + symmetric_beta(0, 0, whole.ids, "feature_transform/l", 2.0)
    shares = symmetric_beta(0, 0, whole.ids, "feature_transform/mu", 1.6)
    partners = permutation(0, 0, whole.ids).tolist()
    total = torch.zeros((), dtype=torch.float64)
    for rows, columns in ((whole.image, whole.text), (whole.text, whole.image)):
        for i in range(N):
            spread = spreads[i] if positive else torch.ones(()).double()
            apart = spread * rows[i] + (1 - spread) * columns[i], spread * columns[i] + (1 - spread) * rows[i]
            logits = [apart[0] @ apart[1]]
            logits += [rows[i] @ columns[j] for j in range(N) if whole.ids[j] != whole.ids[i]]
            for j in range(N) if negative else ():
                if int(whole.ids[i]) not in (int(whole.ids[j]), int(whole.ids[partners[j]])):
                    mixture = shares[j] * columns[j] + (1 - shares[j]) * columns[partners[j]]
                    mixture = mixture / mixture.norm() if unit_norm else mixture
                    logits.append(rows[i] @ mixture.detach())
            total = total + torch.logsumexp(whole.scale * torch.stack(logits), 0) - whole.scale[0] * logits[0]
    return total / (2 * N)


@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_value_and_gradients_equal_the_definition_at_any_world_size(scale: float) -> None:
    assert_defined_by(replace(TRANSFORMED, scale=scale), definition)


def test_either_half_can_be_left_out_and_mixtures_brought_to_unit_norm() -> None:
    negatives = replace(TRANSFORMED, providers={"feature_transform": {"positive": None, "unit_norm": True}})
    assert_defined_by(negatives, lambda whole: definition(whole, positive=False, unit_norm=True), (1,))
    positives = replace(TRANSFORMED, providers={"feature_transform": {"negative": None}})
    assert_defined_by(positives, lambda whole: definition(whole, negative=False), (1,))
    neither = replace(TRANSFORMED, providers={"feature_transform": {"positive": None, "negative": None}})
    assert_same(on_ranks(neither, 1), on_ranks(replace(TRANSFORMED, providers={}), 1), tolerance=0)


@pytest.mark.parametrize(
    ("spread", "similarity", "expected"), [(1.5, 0.6, 0.0), (1.0, 0.6, 0.6), (1.7, 1.0, 1.0), (2.0, 0.0, -4.0)]
)
def test_the_similarity_of_an_extrapolated_pair(spread: float, similarity: float, expected: float) -> None:
    image = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    text = torch.tensor([[similarity, (1 - similarity**2) ** 0.5]], dtype=torch.float64)
    pairs = replace(pair_up(image, text), positive_spread=torch.tensor([spread], dtype=torch.float64))
    assert pairs.positive_similarity().item() == pytest.approx(expected, abs=1e-12)


def test_interpolation_from_a_column_to_its_partner() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    partners = torch.tensor([1, 2, 0])
    assert torch.equal(interpolate(rows, partners, torch.ones(3)), rows)
    assert torch.equal(interpolate(rows, partners, torch.zeros(3)), rows[partners])
    mixed = interpolate(rows, partners, torch.tensor([0.25, 0.5, 1.0]))
    assert mixed.tolist() == [[0.25, 0.75], [0.0, 0.0], [0.0, -1.0]]


def test_the_permutation_is_one_and_changes_with_the_step() -> None:
    ids = torch.arange(50)
    first = permutation(0, 0, ids)
    assert sorted(first.tolist()) == ids.tolist()
    assert not torch.equal(first, permutation(0, 1, ids))


def test_a_mixture_is_no_negative_of_either_of_its_samples() -> None:
    """Columns of samples (5, 6), (6, 6), (7, 5) and (8, 9), for rows of samples 5, 6, 8 and 4."""
    columns = torch.eye(4, dtype=torch.float64)
    image = torch.full((4, 4), 0.5, dtype=torch.float64)
    pairs = pair_up(image, image, torch.tensor([5, 6, 8, 4]))
    ids = torch.tensor([5, 6, 7, 8]), torch.tensor([6, 6, 5, 9])
    extra = SharedNegatives(pairs, {"image": columns, "text": columns}, ids)
    assert extra.num_columns("text").tolist() == [2, 2, 3, 4]
    found = extra.log_sum_exp(image, "text", torch.ones(1).double())
    expected = torch.tensor([2.0, 2.0, 3.0, 4.0]).double().log() + 0.5
    torch.testing.assert_close(found, expected)
