"""Several heads with a temperature a pair: the definition entry by entry, closed forms, and symmetries."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.parity import D, N, Setting, Whole, assert_same, defined, on_ranks, unit, whole
from tests.vlm.objectives.parity import leaves as leaves_of
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.objectives.objective import Objective
from vlm.objectives.state import RunFacts
from vlm.objectives.terms.multi_head import MultiHead
from vlm.similarity.exchange import Exchange

FACTS = RunFacts(dim=D, num_samples=40, num_steps=10, steps_per_epoch=5, seed=0, world=World())
IDS = (7, 3, 11, 5, 20, 2, 7, 8, 9, 40, 3)  # two samples come twice


def of_one_row(
    rows: Tensor, columns: Tensor, i: int, ids: Tensor, own: dict[str, Tensor], options: dict[str, Any]
) -> Tensor:
    """One row of one head and direction, in single numbers."""

    def network(row: Tensor) -> Tensor:
        inner = (own["inner_weight"] @ row + own["inner_bias"]).clamp(min=0)
        return own["outer_weight"] @ inner + own["outer_bias"]

    def temperature(row: Tensor, column: Tensor) -> Tensor:
        low, high = options.get("temperature_min", 1e-5), options.get("temperature_max", 2.0)
        value: Tensor = low + (high - low) / (1 + (network(row) @ network(column)).exp())
        return value

    negatives = [j for j in range(len(columns)) if ids[j] != ids[i]]
    negatives.sort(key=lambda j: (rows[i] @ columns[j]).item(), reverse=True)
    chosen = negatives[: options.get("hardest", 100)]
    temperatures = [temperature(rows[i], columns[j]) for j in chosen]
    pushed = sum(rows[i] @ columns[j] / t for j, t in zip(chosen, temperatures, strict=True)) / len(chosen)
    released = sum(t.log() + 1 / t for t in temperatures)
    t = temperature(rows[i], columns[i])
    held = len(rows[i]) / 2 * t.log() + 1 / t
    loss: Tensor = pushed - rows[i] @ columns[i] / t + options.get("beta", 0.01) * (held - released)
    return loss


def value(batch: Whole, own: dict[str, Tensor], heads: int, options: dict[str, Any]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(batch.image.chunk(heads, 1), batch.text.chunk(heads, 1), strict=True):
        for i in range(N):
            both = ((unit(x), unit(y)), (unit(y), unit(x)))
            total = total + sum(of_one_row(*pair, i, batch.ids, own, options) for pair in both) / 2
    return total / N


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (2, {"hardest": 4, "hidden": 5}),
        (3, {"hidden": 4, "beta": 0.2, "temperature_min": 0.1}),
        (1, {"hardest": 1, "temperature_max": 0.5}),
    ],
)
def test_value_and_gradients_are_the_definition(heads: int, options: dict[str, Any]) -> None:
    term = MultiHead(heads=heads, **options)
    own = {name: tensor.double().requires_grad_() for name, tensor in term.parameters(FACTS).items()}
    setting = Setting({"multi_head": {"heads": heads, **options}}, ids=IDS)
    expected = defined(setting, lambda batch: value(batch, own, heads, options))
    expected |= {f"multi_head/{name}": tensor.grad for name, tensor in own.items() if tensor.grad is not None}
    assert len(expected) >= 8
    for world_size in (1, 2, 3):
        assert_same(on_ranks(setting, world_size), expected)


def test_with_the_ring_it_is_the_same() -> None:
    gathered = Setting({"multi_head": {"heads": 2, "hardest": 4}})
    ring = Setting({"multi_head": {"heads": 2, "hardest": 4}}, similarity={"exchange": "ring"})
    assert_same(on_ranks(ring, 3), on_ranks(gathered, 1))


def evaluated(image: Tensor, text: Tensor, own: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    term = MultiHead(**options)
    facts = RunFacts(dim=image.shape[1], num_samples=9, num_steps=9, steps_per_epoch=9, seed=0, world=World())
    parameters = own or term.parameters(facts)
    batch = batch_of(len(image))
    named = {f"multi_head/{name}": tensor.to(image.dtype) for name, tensor in parameters.items()}
    outputs = outputs_of(image, text, image.new_ones(1), parameters=named)
    found, _ = Objective({"multi_head": term}, exchange=Exchange(World()), facts=facts).evaluate(outputs, batch)
    return found


def rows_of_fixture() -> tuple[Tensor, Tensor]:
    raw = leaves_of(Setting({}))
    batch = whole(Setting({}), raw)
    return batch.image.detach(), batch.text.detach()


def test_one_head_of_constant_temperature_over_all_negatives_is_the_linear_loss() -> None:
    """-s_+ / T + mean s_- / T, without the terms that hold temperatures."""
    image, text = rows_of_fixture()
    similarities = image @ text.T
    off_diagonal = (similarities.sum() - similarities.trace()) / (N * (N - 1))
    expected = (off_diagonal - similarities.trace() / N) / 0.3
    found = evaluated(image, text, heads=1, beta=0, temperature_min=0.3, temperature_max=0.3)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_heads_may_change_places() -> None:
    image, text = rows_of_fixture()
    swapped = [rows.unflatten(1, (3, 2))[:, [2, 0, 1]].flatten(1) for rows in (image, text)]
    found, other = evaluated(image, text, heads=3), evaluated(*swapped, heads=3)
    assert found.item() == pytest.approx(other.item(), abs=1e-12)


@pytest.mark.parametrize(("similarity", "expected"), [(0.005, 0.0078125), (-0.3, 2 * 0.31 / 1.28)])
def test_a_positive_alone_is_best_at_the_temperature_of_the_closed_form(similarity: float, expected: float) -> None:
    """2 (beta - s) / (beta d) at beta 0.01, d 128, where that lies between the bounds; found by trying temperatures.

    The network is made to give the constant c, so that each temperature is 2 / (1 + exp(c^2)).
    """
    image = torch.zeros(1, 128, dtype=torch.float64)
    image[0, 0] = 1
    text = torch.zeros(1, 128, dtype=torch.float64)
    text[0, :2] = torch.tensor([similarity, math.sqrt(1 - similarity**2)])

    def at(temperature: float) -> float:
        own = {"inner_weight": torch.zeros(1, 128), "inner_bias": torch.zeros(1), "outer_weight": torch.zeros(128, 1)}
        constant = torch.zeros(128, dtype=torch.float64)
        constant[0] = math.sqrt(math.log(2 / temperature - 1))
        return evaluated(image, text, {**own, "outer_bias": constant}, heads=1, hidden=1).item()

    best = at(expected)
    assert best < at(expected * 0.97)
    assert best < at(expected * 1.03)


@pytest.mark.parametrize("count", [1, 2])
def test_few_rows_have_few_negatives_and_finite_gradients(count: int) -> None:
    image, text = (rows[:count].clone().requires_grad_() for rows in rows_of_fixture())
    evaluated(image, text, heads=2).backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_heads_that_do_not_divide_and_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(EveryRankError, match=r"multi_head\.heads: 4 heads do not divide the embedding's 6 dimensions"):
        Objective({"multi_head": MultiHead(heads=4)}, facts=FACTS).parameters()
    with pytest.raises(ValidationError, match="temperature_min 3 is above temperature_max 2"):
        MultiHead(temperature_min=3)
