"""Shuffled group whitening: unit covariances of the global batch, and the loss of the whitened rows."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.ranks import run_ranks
from tests.vlm.objectives.one_process import value_of
from tests.vlm.objectives.parity import D, N, Setting, Whole, assert_defined_by, assert_same, defined, on_ranks, unit
from vlm.distributed.world import World
from vlm.errors import EveryRankError
from vlm.objectives.counter_rng import uniforms
from vlm.objectives.objective import Objective
from vlm.objectives.recipe import Terms
from vlm.objectives.state import RunFacts
from vlm.objectives.terms.whitening import Whitening, whitened
from vlm.similarity.exchange import Exchange

EPSILON = 1e-4


def by_eigenvectors(rows: Tensor, order: Tensor, group_size: int, epsilon: float = EPSILON) -> Tensor:
    """The definition, one group after the other."""
    made = torch.zeros_like(rows)
    for group in order.split(group_size):
        centred = rows[:, group] - rows[:, group].mean(0)
        covariance = centred.T @ centred / len(rows)
        regular = covariance + (epsilon * covariance.trace() / group_size + 1e-12) * torch.eye(group_size).double()
        values, vectors = torch.linalg.eigh(regular)
        made[:, group] = centred @ vectors @ torch.diag(values**-0.5) @ vectors.T
    return made


def drawn_order(tower: str, view: int) -> Tensor:
    """The order of a view at seed 0 and step 0: the random numbers that the docstring promises."""
    return uniforms(0, 0, torch.tensor([view]), f"whitening/{tower}", D)[0].argsort()


def contrast(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * unit(x) @ unit(y).T
    targets = torch.arange(len(x))
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


def value(whole: Whole, group_size: int, views: int = 2, towers: tuple[str, ...] = ("image", "text")) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for view in range(views):
        rows = {
            name: by_eigenvectors(of, drawn_order(name, view), group_size) if name in towers else of
            for name, of in (("image", whole.image), ("text", whole.text))
        }
        total = total + contrast(rows["image"], rows["text"], whole.scale)
    return total / views


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
def test_value_and_gradients_are_those_of_whitening_the_whole_batch(group_size: int) -> None:
    options = {"group_size": group_size, "head": False}
    assert_defined_by(Setting({"whitening": options}), lambda whole: value(whole, group_size), world_sizes=(1, 2, 3))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_alone_and_with_the_ring(tower: str) -> None:
    options = {"group_size": 3, "head": False, "views": 1, "image": tower == "image", "text": tower == "text"}
    setting = Setting({"whitening": options}, similarity={"exchange": "ring"})
    assert_defined_by(setting, lambda whole: value(whole, 3, 1, (tower,)))


def test_the_head_stands_behind_the_whitening_and_learns() -> None:
    setting = Setting({"whitening": {"group_size": 3, "views": 1}})
    facts = RunFacts(dim=D, num_samples=40, num_steps=10, steps_per_epoch=5, seed=0, world=World())
    own = {name: tensor.double().requires_grad_() for name, tensor in Whitening(group_size=3).parameters(facts).items()}

    def definition(whole: Whole) -> Tensor:
        seen = {}
        for name, rows in (("image", whole.image), ("text", whole.text)):
            flat = by_eigenvectors(rows, drawn_order(name, 0), 3)
            seen[name] = (flat @ own[f"{name}_weight"].T + own[f"{name}_bias"]).tanh()
        return contrast(seen["image"], seen["text"], whole.scale)

    expected = defined(setting, definition)
    expected |= {f"whitening/{name}": tensor.grad for name, tensor in own.items() if tensor.grad is not None}
    assert len(expected) > 5
    for world_size in (1, 3):
        assert_same(on_ranks(setting, world_size), expected)


def covariance_of(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return centred.T @ centred / len(rows)


def on_this_rank(order: Tensor) -> Tensor:
    world = World.current()
    share = rows_of(N).split([3, 8] if world.size == 2 else [N])[world.rank]
    ranks, _ = Exchange(world).count(len(share))
    return ranks.gather_constant(whitened(share, order, 3, 1e-13, ranks))


def rows_of(count: int, dim: int = D) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_each_group_has_mean_zero_and_the_identity_as_covariance_over_all_ranks() -> None:
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    for made in (on_this_rank(order), *run_ranks(on_this_rank, 2, order)):
        torch.testing.assert_close(made.mean(0), torch.zeros(D).double(), rtol=0, atol=1e-12)
        for group in order.split(3):
            torch.testing.assert_close(covariance_of(made[:, group]), torch.eye(3).double(), rtol=0, atol=1e-10)
        assert covariance_of(made)[4, 5].abs() > 1e-3  # of different groups


def test_groups_of_one_standardise_and_the_order_of_dimensions_comes_back() -> None:
    rows = rows_of(9)
    ranks, _ = Exchange(World()).count(9)
    expected = (rows - rows.mean(0)) / rows.std(0, correction=0)
    for order in (torch.arange(D), torch.tensor([5, 2, 0, 1, 4, 3])):
        found = whitened(rows, order, 1, 1e-14, ranks)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [rows_of(3), rows_of(1).expand(5, D), rows_of(1)])
def test_too_few_rows_for_a_full_rank_stay_finite(rows: Tensor) -> None:
    for dtype in (torch.float64, torch.float32):
        leaf = unit(rows).to(dtype).requires_grad_()
        found = value_of("whitening", leaf, unit(rows.roll(1, 1)).to(dtype), 10.0, group_size=6, head=False)
        found.backward()
        assert found.isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_single_precision_rows_that_hardly_differ_lose_no_digits() -> None:
    """Rows that differ by 1e-3: in single precision their mean alone would be off by 1e-4 of that."""
    rows = (1 + 1e-3 * rows_of(64, 32)).float()
    ranks, _ = Exchange(World()).count(64)
    order = torch.arange(32)
    expected = whitened(rows.double(), order, 8, EPSILON, ranks)
    torch.testing.assert_close(whitened(rows, order, 8, EPSILON, ranks).double(), expected, rtol=0, atol=1e-6)


def test_views_towers_and_steps_shuffle_differently() -> None:
    drawn = [tuple(drawn_order(tower, view).tolist()) for tower in ("image", "text") for view in range(3)]
    assert len(set(drawn)) == len(drawn)
    assert all(sorted(order) == list(range(D)) for order in drawn)
    other = uniforms(0, 1, torch.tensor([0]), "whitening/image", D)[0].argsort()
    assert tuple(other.tolist()) != drawn[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image": False, "text": False}, "whiten images, texts or both"), ({"epsilon": 0}, "epsilon")],
)
def test_options_that_whiten_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Whitening.model_validate(options)


def test_a_recipe_names_the_term_whose_options_do_not_go_together() -> None:
    with pytest.raises(ValidationError, match=r"error, whitening: whiten images, texts or both"):
        TypeAdapter(Terms).validate_python({"whitening": {"image": False, "text": False}})
    with pytest.raises(ValidationError, match=r"error, whitening\.views: found 0"):
        TypeAdapter(Terms).validate_python({"whitening": {"views": 0}})


def test_groups_that_do_not_fill_the_embedding_are_refused() -> None:
    facts = RunFacts(dim=30, num_samples=40, num_steps=10, steps_per_epoch=5, seed=0, world=World())
    with pytest.raises(EveryRankError, match=r"group_size: groups of 8 do not fill the embedding's 30 dimensions"):
        Objective({"whitening": Whitening()}, facts=facts).parameters()
