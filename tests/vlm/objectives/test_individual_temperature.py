"""iSogCLR: value, gradients, temperatures and memory are the authors' loops', however ranks share the samples."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.global_contrast import ByHand, expected
from tests.vlm.objectives.parity import UNEVEN, D, N, Setting, assert_same, defined, leaves, on_ranks, unit, whole
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.objectives.objective import Objective
from vlm.objectives.registry import TERMS
from vlm.objectives.sample_table import SampleTable
from vlm.objectives.state import RunFacts
from vlm.objectives.terms.individual_temperature import IndividualTemperature
from vlm.similarity.exchange import Exchange

NAME = "individual_temperature"
WARM: dict[str, Any] = {"temperature_init": 0.2, "rho": 1.0}  # temperatures move both ways, no bound is met
BY_HAND = ByHand(temperature=0.2, rho=1.0)


def setting(num_steps: int = 1, **options: Any) -> Setting:
    return Setting({NAME: {**WARM, **options}}, num_steps=num_steps)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_steps_equal_the_double_loop_with_a_dictionary_a_sample(num_steps: int, world_size: int) -> None:
    assert_same(on_ranks(setting(num_steps), world_size), expected(setting(num_steps), BY_HAND))


def test_the_papers_constants_are_the_defaults() -> None:
    chosen = Setting({NAME: 1.0}, num_steps=3)
    assert_same(on_ranks(chosen, 1), expected(chosen, ByHand()), tolerance=1e-9)


def test_clipped_slopes_bounded_temperatures_and_a_large_eps() -> None:
    chosen = setting(4, gradient_limit=0.3, temperature_min=0.19, temperature_max=0.21, eps=0.1, momentum=0.5)
    by_hand = replace(BY_HAND, limit=0.3, bounds=(0.19, 0.21), eps=0.1, momentum=0.5)
    assert_same(on_ranks(chosen, 1), expected(chosen, by_hand))
    assert {memory["tau"] for memory in by_hand.memory.values()} >= {0.19, 0.21}


def test_a_sample_that_is_twice_in_the_batch_keeps_what_its_first_row_says() -> None:
    ids = (7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3)
    assert_same(on_ranks(replace(setting(3), ids=ids), 3), expected(replace(setting(3), ids=ids), BY_HAND))


def test_a_ring_changes_nothing() -> None:
    ring = replace(setting(2), similarity={"exchange": "ring"})
    assert_same(on_ranks(ring, 3), expected(setting(2), BY_HAND))


def test_groups_of_ranks_share_one_memory() -> None:
    """Two groups of two ranks: negatives are the group's, the memory is everyone's."""
    chosen = setting(3)
    memory = replace(BY_HAND, memory={})
    for step in range(3):
        raw = leaves(chosen, step)
        batch = whole(chosen, raw)
        parts = [
            memory(replace(batch, image=batch.image[rows], text=batch.text[rows], ids=batch.ids[rows]), step)
            * ((rows.stop - rows.start) / N)
            for rows in (slice(0, 4), slice(4, 11))
        ]
    value = parts[0] + parts[1]
    value.backward()
    result = on_ranks(replace(chosen, similarity={"group_ranks": 2}), 4)
    gradients = {name: raw[name].grad for name in ("image", "text")}
    assert_same(result, {"value": value.detach(), **{k: v for k, v in gradients.items() if v is not None}})


def test_without_average_and_rate_the_gradients_are_those_of_a_softmax_over_negatives() -> None:
    """gamma 1, eta 0: tau log mean_j exp(h_ij / tau), differentiated as it stands."""

    def robust(batch: Any) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        similarity = batch.image @ batch.text.T
        for matrix in (similarity, similarity.T):
            contrast = matrix - matrix.diagonal()[:, None]
            some = contrast[~torch.eye(N, dtype=torch.bool)].view(N, N - 1)
            total = total + (0.2 * ((some / 0.2).logsumexp(1) - math.log(N - 1) + 1.0)).sum()
        return total / (2 * N)

    chosen = setting(3, gamma=1.0, rate=0.0, eps=0.0)
    assert_same(on_ranks(chosen, 3), {k: v for k, v in defined(chosen, robust, step=2).items() if k != "bias"})


def anchored(contrasts: tuple[float, ...], **options: Any) -> tuple[float, float]:
    """Derivative and temperature after one step of an image with these h: momentum 1 keeps the derivative itself."""
    positive = 0.5
    similarities = torch.tensor([positive, *(positive + h for h in contrasts)], dtype=torch.float64)
    count = len(similarities)
    text = torch.zeros(count, count + 1, dtype=torch.float64)
    text[:, 0] = similarities
    text[torch.arange(count), torch.arange(count) + 1] = (1 - similarities**2).sqrt()
    image = torch.zeros(count, count + 1, dtype=torch.float64)
    image[:, 0] = 1
    term = IndividualTemperature(**{"momentum": 1.0, "gradient_limit": 100.0, "temperature_init": 0.1, **options})
    facts = RunFacts(count + 1, 0, 10, 10, 0, World())
    objective = Objective({NAME: term}, facts=facts)
    ids = torch.arange(count)
    objective.evaluate(outputs_of(image, text, torch.ones(1, dtype=torch.float64)), batch_of(ids))
    objective.commit()
    table = objective.states[NAME]
    assert isinstance(table, SampleTable)
    row = table.read(ids)
    return float(row["image_momentum"][0]), float(row["image_temperature"][0])


def test_the_temperatures_derivative_is_rho_where_all_negatives_are_alike() -> None:
    derivative, temperature = anchored((-0.3, -0.3, -0.3), rho=2.5, rate=0.01)
    assert derivative == pytest.approx(2.5, abs=1e-9)
    assert temperature == pytest.approx(0.1 - 0.01 * 2.5, abs=1e-9)


def test_the_temperatures_derivative_is_the_analytic_one() -> None:
    derivative, _ = anchored((-0.2, -0.5, -0.9), rho=6.0, eps=0.0)
    assert derivative == pytest.approx(5.0991, abs=5e-5)


def test_a_sample_without_negatives_counts_nothing_and_changes_nothing() -> None:
    term = IndividualTemperature()
    objective = Objective({NAME: term}, facts=RunFacts(D, 0, 10, 10, 0, World()))
    row = unit(torch.randn(2, D, dtype=torch.float64)).requires_grad_()
    encoded = outputs_of(row, row, torch.ones(1, dtype=torch.float64))
    same = torch.tensor([4, 4])
    total, _ = objective.evaluate(encoded, batch_of(same))
    total.backward()
    objective.commit()
    assert total.item() == 0
    assert row.grad is not None
    assert row.grad.abs().sum() == 0
    table = objective.states[NAME]
    assert isinstance(table, SampleTable)
    assert table.read(same)["text_temperature"].tolist() == [0.01, 0.01]
    assert table.read(same)["text_log_mean"].tolist() == [-math.inf, -math.inf]


def test_the_coldest_temperature_stays_finite_in_single_precision() -> None:
    """h / tau of -400 to 400: exponentials of it do not exist in fp32."""
    objective = Objective(
        {NAME: IndividualTemperature(temperature_init=5e-3)}, facts=RunFacts(D, 0, 10, 10, 0, World())
    )
    image = unit(torch.randn(5, D, generator=torch.Generator().manual_seed(0))).requires_grad_()
    text = torch.cat([-image.detach()[:2], image.detach()[2:]])
    for step in range(3):
        total, _ = objective.evaluate(outputs_of(image, text, torch.ones(1)), batch_of(5, step=step))
        total.backward()
        objective.commit()
        assert total.isfinite()
        assert image.grad is not None
        assert image.grad.isfinite().all()


def test_what_no_temperature_can_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature_init: 0\.01 is not within"):
        IndividualTemperature(temperature_min=0.02)
    with pytest.raises(UserError, match=NAME):
        TERMS.find("individual_temperatures")


def continued(pieces: list[dict[str, Tensor]], first: int, last: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Steps `first` to `last` on this rank's rows, from what ranks of before held; the value, and what it holds now."""
    world = World.current()
    objective = Objective(
        {NAME: IndividualTemperature(**WARM)}, exchange=Exchange(world), facts=RunFacts(D, 40, 10, 5, 0, world)
    )
    table = objective.states[NAME]
    table.restore({}, pieces)
    start = sum(UNEVEN[world.size][: world.rank])
    rows = slice(start, start + UNEVEN[world.size][world.rank])
    for step in range(first, last):
        batch = whole(setting(), leaves(setting(), step))
        share, _ = objective.evaluate(
            outputs_of(batch.image[rows], batch.text[rows], batch.scale), batch_of(batch.ids[rows], step=step)
        )
        objective.commit()
    return world.sum(share) / world.size, table.local()


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 2)])
def test_a_run_continues_alike_at_another_world_size(before: int, after: int) -> None:
    held: list[dict[str, Tensor]] = []
    for size, first, last in ((before, 0, 2), (after, 2, 4)):
        results = [continued(held, first, last)] if size == 1 else run_ranks(continued, size, held, first, last)
        held = [local for _, local in results]
    values = expected(setting(4), BY_HAND)
    torch.testing.assert_close(results[0][0], values["value"], rtol=1e-10, atol=1e-10)
