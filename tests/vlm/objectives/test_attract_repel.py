"""Contrastive attraction and repulsion: the paper's closed forms, and its definition at any world size."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.parity import Setting, Whole, assert_defined_by
from vlm.objectives.objective import Objective
from vlm.objectives.terms.attract_repel import AttractRepel


def cost(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum()


def definition(
    whole: Whole,
    by: str = "sample",
    t_plus: float = 1.0,
    t_minus: float = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    rbf_t: float | None = None,
    detach: bool = False,
) -> Tensor:
    """Query by query, over the lists of its positives and negatives."""

    def weights(costs: Tensor, sharpness: float) -> Tensor:
        return torch.softmax(sharpness * (costs.detach() if detach else costs), 0)

    keys = {"sample": whole.ids, "caption": whole.captions, "label": whole.labels}[by]
    count = len(whole.image)
    total = torch.zeros((), dtype=torch.float64)
    for queries, others, captions in ((whole.image, whole.text, True), (whole.text, whole.image, False)):
        repulsions = []
        for i in range(count):
            if by == "sample":
                own = whole.all_captions[whole.caption_rows == i] if captions else others[i : i + 1]
            else:
                own = others[keys == keys[i]]
            near = torch.stack([cost(queries[i], positive) for positive in own])
            total = total + alpha * weights(near, t_plus) @ near / count
            far = [
                cost(queries[i], others[j]) for j in range(count) if keys[j] != keys[i] and whole.ids[j] != whole.ids[i]
            ]
            if far:
                costs = torch.stack(far)
                pushed = -costs if rbf_t is None else (-rbf_t * costs).exp()
                repulsions.append(weights(costs, -t_minus) @ pushed)
        if repulsions:
            together = torch.stack(repulsions)
            total = total + beta * (together.sum() / count if rbf_t is None else together.mean().log())
    return total / 2


def test_one_positive_at_any_world_size() -> None:
    assert_defined_by(Setting({"attract_repel": 1.0}), definition)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("rbf_t", [None, 2.0])
def test_every_option_of_the_costs_over_classes(rbf_t: float | None, detach: bool) -> None:
    options: dict[str, Any] = {"by": "label", "t_plus": 0.7, "t_minus": 1.5, "alpha": 0.8, "beta": 1.3}
    chosen = {"cost": "euclidean" if rbf_t is None else "rbf", "detach_weights": detach}
    assert_defined_by(
        Setting({"attract_repel": {**options, **chosen}}),
        lambda whole: definition(whole, rbf_t=rbf_t, detach=detach, **options),
    )


def test_equal_captions_and_repeated_samples_in_a_ring() -> None:
    setting = Setting({"attract_repel": {"by": "caption"}}, similarity={"exchange": "ring"})
    repeated = replace(setting, ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3))
    assert_defined_by(repeated, lambda whole: definition(whole, by="caption"), (3,))


@pytest.mark.parametrize("t_plus", [0.0, 1.0, 300.0])
def test_an_image_is_drawn_to_all_its_captions(t_plus: float) -> None:
    setting = Setting({"attract_repel": {"t_plus": t_plus}}, several_captions=True)
    assert_defined_by(setting, lambda whole: definition(whole, t_plus=t_plus))


@pytest.mark.parametrize("rbf", [False, True])
def test_queries_without_negatives_are_not_repelled(rbf: bool) -> None:
    """The first row shares its sample or its caption with each other row; with one class in all, attraction is left."""
    options: dict[str, Any] = {"by": "caption", "cost": "rbf" if rbf else "euclidean"}
    first = Setting(
        {"attract_repel": options}, ids=(7,) * 6 + (8, 9, 40, 1, 5), captions=(0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0)
    )
    assert_defined_by(first, lambda whole: definition(whole, by="caption", rbf_t=2.0 if rbf else None))
    alone = Setting({"attract_repel": {**options, "by": "label"}}, labels=(0,) * 11)
    assert_defined_by(alone, lambda whole: definition(whole, by="label", beta=0.0))


def unit_at(costs: list[float]) -> Tensor:
    """Unit rows whose squared distance to the first axis is as given."""
    cosines = 1 - torch.tensor(costs, dtype=torch.float64) / 2
    return torch.stack([cosines, (1 - cosines**2).sqrt()], 1)


def evaluate(term: AttractRepel, image: Tensor, text: Tensor, captions: Tensor | None = None) -> float:
    owners = None if captions is None else torch.zeros(len(captions), dtype=torch.int64)
    batch = batch_of(len(image), caption_owners=owners)
    outputs = outputs_of(image, text, torch.ones(1, dtype=torch.float64), captions=captions)
    return Objective({"attract_repel": term}).evaluate(outputs, batch)[0].item()


@pytest.mark.parametrize(("t_plus", "attraction"), [(1.0, 0.339475), (0.0, 0.3)])
def test_attraction_of_two_captions_is_the_closed_form(t_plus: float, attraction: float) -> None:
    captions = unit_at([0.1, 0.5])
    value = evaluate(AttractRepel(t_plus=t_plus, beta=0.0), unit_at([0.0]), captions[:1], captions)
    assert 2 * value - 0.1 == pytest.approx(attraction, abs=1e-6)  # the text's own attraction is 0.1


@pytest.mark.parametrize(("t_minus", "repulsion"), [(1.0, -0.768941), (0.0, -1.0)])
def test_repulsion_of_two_negatives_is_the_closed_form(t_minus: float, repulsion: float) -> None:
    """Three equal images, and texts at 0, 0.5 and 1.5 from them: the first image meets the two negatives."""
    image, text = unit_at([0.0, 0.0, 0.0]), unit_at([0.0, 0.5, 1.5])
    total = 6 * evaluate(AttractRepel(t_minus=t_minus, alpha=0.0), image, text)

    def pushed(*costs: float) -> float:
        exponentials = [math.exp(-t_minus * one) for one in costs]
        return -sum(e * one for e, one in zip(exponentials, costs, strict=True)) / sum(exponentials)

    elsewhere = pushed(0.0, 1.5) + pushed(0.0, 0.5) - 0.0 - 0.5 - 1.5  # other images; texts, whose negatives are equal
    assert total - elsewhere == pytest.approx(repulsion, abs=1e-6)
