"""Group ordering: the paper's closed forms, and its definition at any world size."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.parity import Setting, Whole, assert_defined_by, on_ranks
from vlm.objectives.objective import Objective
from vlm.objectives.terms.ordering import Ordering

ORDERING = Setting({"ordering": {"num_negatives": 4}})


def sorted_masses(values: list[Tensor], steepness: float) -> list[list[Tensor]]:
    """masses[i][k] of value i on rank k: the odd-even network, one comparison after another."""
    size = len(values)
    zero, one = torch.zeros_like(values[0]), torch.ones_like(values[0])
    masses = [[one if i == k else zero for k in range(size)] for i in range(size)]
    for layer in range(size):
        for k in range(layer % 2, size - 1, 2):
            a, b = values[k], values[k + 1]
            stays = 0.5 + torch.atan(steepness * (b - a)) / math.pi
            values = [*values[:k], stays * a + (1 - stays) * b, stays * b + (1 - stays) * a, *values[k + 2 :]]
            for row in masses:
                row[k], row[k + 1] = (
                    stays * row[k] + (1 - stays) * row[k + 1],
                    stays * row[k + 1] + (1 - stays) * row[k],
                )
    return masses


def ascending(values: list[Tensor]) -> list[Tensor]:
    return sorted(values, key=lambda value: value.detach().item())


def anchor_loss(positives: list[Tensor], negatives: list[Tensor], steepness: float) -> Tensor:
    """Half of either group's binary cross-entropy, as the authors write it."""
    count = len(negatives)
    masses = sorted_masses([*ascending(negatives), *ascending(positives)], steepness)
    total = torch.zeros((), dtype=torch.float64)
    for element, row in enumerate(masses):
        low, high = sum(row[1:count], start=row[0]), sum(row[count + 1 :], start=row[count])
        chosen = (high, 1 - low) if element >= count else (low, 1 - high)
        total = total - sum((c.log() for c in chosen), start=torch.zeros(())) / 2
    return total / len(masses)


def definition(whole: Whole, num_negatives: int = 4, steepness: float = 1.0) -> Tensor:
    """Anchor by anchor; nothing but the anchor has a gradient."""
    count = len(whole.image)
    total = torch.zeros((), dtype=torch.float64)
    for anchors, others, captions in ((whole.image, whole.text, True), (whole.text, whole.image, False)):
        for i in range(count):
            own = whole.all_captions[whole.caption_rows == i] if captions else others[i : i + 1]
            positives = [anchors[i] @ one.detach() for one in own]
            negatives = [anchors[i] @ others[j].detach() for j in range(count) if whole.ids[j] != whole.ids[i]]
            nearest = ascending(negatives)[-num_negatives:]
            if nearest:
                total = total + anchor_loss(positives, nearest, steepness)
    return total / (2 * count)


def test_the_nearest_negatives_of_all_ranks_are_sorted_and_only_anchors_move() -> None:
    assert_defined_by(ORDERING, definition)


def test_several_captions_and_few_negatives() -> None:
    """Images have one to three positives; anchors have 8 to 10 negatives, of at most 10; a steeper network."""
    setting = Setting({"ordering": {"steepness": 3.0}}, several_captions=True)
    repeated = replace(setting, ids=(7, 7, 7, 5, 5, 2, 31, 8, 9, 40, 1))
    assert_defined_by(repeated, lambda whole: definition(whole, 10, 3.0))


def test_a_batch_of_one_sample_has_no_loss_and_no_gradient() -> None:
    alone = replace(ORDERING, ids=(7,) * 11)
    for world_size in (1, 3):
        assert not any(tensor.any() for tensor in on_ranks(alone, world_size).values())


@pytest.mark.parametrize(("difference", "loss"), [(0.0, 0.693147), (0.5, 0.434507), (-0.5, 1.042942)])
def test_one_positive_and_one_negative_are_the_closed_form(difference: float, loss: float) -> None:
    """Two pairs of rows at right angles, so that similarities are chosen at will: 0.25 + difference and 0.25."""
    positive, negative = 0.25 + difference, 0.25
    rest = math.sqrt(1 - positive**2 - negative**2)
    image = torch.eye(4, dtype=torch.float64)[:2]
    text = torch.tensor([[positive, negative, rest, 0], [negative, positive, 0, rest]], dtype=torch.float64)
    outputs = outputs_of(image, text, torch.ones(1, dtype=torch.float64))
    value, _ = Objective({"ordering": Ordering(num_negatives=1)}).evaluate(outputs, batch_of([5, 8]))
    assert value.item() == pytest.approx(loss, abs=1e-6)
