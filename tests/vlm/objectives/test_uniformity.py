"""Uniformity and alignment: closed forms, the global batch, and what a mean of ranks' own values is not."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.geometry_definitions import fixture, log_mean_potential, turned
from tests.vlm.objectives.one_process import near_duplicates, value_of
from tests.vlm.objectives.parity import (
    UNEVEN,
    Setting,
    Whole,
    assert_defined_by,
    assert_same,
    defined,
    leaves,
    on_ranks,
    whole,
)

ONE = {"image": {"image": 1.0, "text": 0.0}, "text": {"image": 0.0}, "cross": {"image": 0.0, "text": 0.0, "cross": 1.0}}
ONE["text"]["text"] = 1.0
ALL = {"image": 0.5, "text": 0.7, "cross": 1.3, "t": 3.0}


def uniformity(whole: Whole, image: float = 0.5, text: float = 0.5, cross: float = 0.0, t: float = 2.0) -> Tensor:
    parts = ((image, whole.image, whole.image), (text, whole.text, whole.text), (cross, whole.image, whole.text))
    return torch.stack([factor * log_mean_potential(u, v, t) for factor, u, v in parts]).sum()


def alignment(whole: Whole, alpha: float = 2.0) -> Tensor:
    return torch.stack([(x - y).norm() ** alpha for x, y in zip(whole.image, whole.text, strict=True)]).mean()


@pytest.mark.parametrize(("part", "value"), [("image", -4.0), ("text", -0.16), ("cross", -1.6)])
def test_values_on_the_fixture(part: str, value: float) -> None:
    assert value_of("uniformity", *fixture(), 5.0, **ONE[part]).item() == pytest.approx(value, abs=1e-12)  # type: ignore[arg-type]


def test_alignment_on_the_fixture() -> None:
    """Both pairs are at 2 - 2 x 0.8."""
    assert value_of("alignment", *fixture(), 5.0).item() == pytest.approx(0.4, abs=1e-12)
    assert value_of("alignment", *fixture(), 5.0, alpha=1.0).item() == pytest.approx(math.sqrt(0.4), abs=1e-12)


def test_uniformity_of_the_paper_is_the_mean_of_both_modalities() -> None:
    assert value_of("uniformity", *fixture(), 5.0).item() == pytest.approx((-4 - 0.16) / 2, abs=1e-12)


def test_its_range_is_from_antipodes_to_one_point() -> None:
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert value_of("uniformity", apart, apart, 5.0).item() == pytest.approx(-8, abs=1e-12)
    together = apart[:1].repeat(3, 1)
    assert value_of("uniformity", together, together, 5.0).item() == pytest.approx(0, abs=1e-12)


def test_turning_one_modality_changes_only_what_is_across() -> None:
    image, text = fixture()

    def values(image: Tensor, text: Tensor) -> list[float]:
        return [
            *(value_of("uniformity", image, text, 5.0, **ONE[part]).item() for part in ("image", "text", "cross")),  # type: ignore[arg-type]
            value_of("alignment", image, text, 5.0).item(),
        ]

    before = values(image, text)
    assert values(turned(image, 0.7), turned(text, 0.7)) == pytest.approx(before, abs=1e-12)
    after = values(turned(image, 0.7), text)
    assert after[:2] == pytest.approx(before[:2], abs=1e-12)
    assert abs(after[2] - before[2]) > 0.1
    assert abs(after[3] - before[3]) > 0.1


@pytest.mark.parametrize("similarity", [{"exchange": "gather"}, {"exchange": "ring"}])
@pytest.mark.parametrize("options", [{}, ALL])
def test_it_is_the_logarithm_of_the_global_mean(similarity: dict[str, Any], options: dict[str, float]) -> None:
    setting = Setting({"uniformity": options}, similarity=similarity)
    assert_defined_by(setting, partial(uniformity, **options), world_sizes=(1, 2, 3))  # type: ignore[arg-type]


def test_the_mean_of_ranks_own_values_is_another_number() -> None:
    setting = Setting({"uniformity": {"cross": 1.0}})
    raw = leaves(setting)
    all_rows = whole(setting, raw)
    expected = uniformity(all_rows, cross=1.0)
    averaged, start = torch.zeros((), dtype=torch.float64), 0
    for count in UNEVEN[2]:
        rows = slice(start, start + count)
        own = replace(all_rows, image=all_rows.image[rows], text=all_rows.text[rows])
        averaged = averaged + uniformity(own, cross=1.0) * count / sum(UNEVEN[2])
        start += count
    found = on_ranks(setting, 2)
    assert abs(found["value"].item() - expected.item()) < 1e-10
    assert abs(averaged.item() - expected.item()) > 0.01
    averaged.backward()
    assert raw["image"].grad is not None
    assert (raw["image"].grad - found["image"]).norm() > 0.01 * found["image"].norm()


def test_groups_of_ranks_have_the_mean_of_their_own_values() -> None:
    """4 ranks with 3, 1, 5, 2 rows in two groups: 4 and 7 rows that are compared."""

    def of_groups(all_rows: Whole) -> Tensor:
        parts = ((slice(0, 4), 4), (slice(4, 11), 7))
        own = [(replace(all_rows, image=all_rows.image[rows], text=all_rows.text[rows]), n) for rows, n in parts]
        return torch.stack([uniformity(group, cross=1.0) * n / 11 for group, n in own]).sum()

    setting = Setting({"uniformity": {"cross": 1.0}}, similarity={"group_ranks": 2})
    assert_same(on_ranks(setting, 4), defined(setting, of_groups))


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_alignment_is_the_mean_over_all_pairs(alpha: float) -> None:
    assert_defined_by(Setting({"alignment": {"alpha": alpha}}), partial(alignment, alpha=alpha), world_sizes=(1, 2, 3))


def test_an_aligned_pair_has_no_gradient_rather_than_none() -> None:
    image = fixture()[0].requires_grad_()
    value_of("alignment", image, fixture()[0], 5.0, alpha=1.0).backward()
    assert image.grad is not None
    assert not image.grad.any()


def test_a_single_pair_has_no_other_to_be_apart_from() -> None:
    image, text = (rows[:1].requires_grad_() for rows in fixture())
    value = value_of("uniformity", image, text, 5.0, cross=1.0)
    value.backward()
    assert value.item() == 0
    assert image.grad is not None
    assert not image.grad.any()


def test_near_duplicates_are_finite_in_fp32() -> None:
    image, text = (rows.requires_grad_() for rows in near_duplicates(40, 16, torch.float32))
    value = value_of("uniformity", image, text, 100.0, cross=1.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert image.grad is not None
    assert image.grad.isfinite().all()
