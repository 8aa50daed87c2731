"""The parts of a recipe's objective: weights, attachments, and the one line on what is wrong with them."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.objectives.parity import Setting, defined, on_ranks, unit
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.model.heads import HeadConfig
from vlm.objectives.objective import Objective
from vlm.objectives.recipe import Providers, Terms
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.exchange import Exchange

TERMS: Any = TypeAdapter(Terms)
PROVIDERS: Any = TypeAdapter(Providers)


def test_the_value_is_the_weighted_sum_of_the_terms() -> None:
    both = on_ranks(Setting({"clip": 0.7, "decoupled": {"weight": 2.0}}), 1)
    clip, decoupled = on_ranks(Setting({"clip": 1.0}), 1), on_ranks(Setting({"decoupled": 1.0}), 1)
    for name in ("value", "image", "text", "scale"):
        torch.testing.assert_close(both[name], 0.7 * clip[name] + 2 * decoupled[name])


def test_a_term_of_weight_0_is_not_computed_and_needs_nothing() -> None:
    objective = Objective(TERMS.validate_python({"clip": 1.0, "momentum_distillation": 0}))
    assert list(objective.terms) == ["clip"]
    assert not objective.needs.teacher_outputs
    assert not objective.states


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"clip": {"label_smoothin": 0.1}}, "clip.label_smoothin: unknown key .* nearest: label_smoothing"),
        ({"clip": {"label_smoothing": 1.5}}, "clip.label_smoothing: found 1.5"),
        ({"clip": 0}, "at least one term with a weight other than 0"),
        ({"hard": {"hardest": "most"}}, "hard.hardest: found 'most'"),
    ],
)
def test_a_mistake_in_a_term_names_term_key_and_value(terms: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TERMS.validate_python(terms)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"fast_clip": {"version": "v1", "gradient_limit": 2}}, "fast_clip: gradient_limit: found 2.0, .* version: v1"),
        ({"fast_clip": {"version": "v0", "rho": 8}}, "rho: found 8.0, .* it is for version: v2 or v3"),
        ({"fast_clip": {"gamma_schedule": "constant", "gamma_decay_epochs": 2}}, "gamma_decay_epochs: found 2.0"),
        ({"decoupled": {"sigma": 0.3}}, "sigma: found 0.3, which means nothing with weighting: null"),
        ({"attract_repel": {"rbf_t": 1}}, "rbf_t: found 1.0, .* cost: euclidean; it is for cost: rbf"),
        ({"clustered_negatives": {"form": "learned_weights", "clusters": [3]}}, r"clusters: found \(3,\)"),
        ({"clustered_negatives": {"form": "cluster_weights", "nearest": 3}}, "nearest: found 3"),
    ],
)
def test_an_option_that_changes_nothing_is_refused(terms: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TERMS.validate_python(terms)


def test_options_without_meaning_may_stand_at_their_defaults() -> None:
    """As they do in the recipe that a run keeps, which writes all of them."""
    terms = TERMS.validate_python({"fast_clip": {"version": "v2"}, "decoupled": 1.0, "attract_repel": 1.0})
    assert TERMS.validate_python(TERMS.dump_python(terms)) == terms
    with pytest.raises(ValidationError, match=r"kappa: found 1\.5, which means nothing with kind: linear"):
        HeadConfig(kind="linear", kappa=1.5)


@pytest.mark.parametrize(
    ("attach_to", "words"),
    [
        (["clipp"], "providers.queue.attach_to: no term 'clipp'; nearest: clip"),
        (["ordering"], "providers.queue.attach_to: ordering takes no providers"),
    ],
)
def test_a_provider_is_attached_to_terms_that_take_it(attach_to: list[str], words: str) -> None:
    terms = TERMS.validate_python({"clip": 1.0, "ordering": 1.0})
    with pytest.raises(UserError, match=words):
        Objective(terms, PROVIDERS.validate_python({"queue": {"attach_to": attach_to}}))


def test_a_provider_serves_only_what_it_is_attached_to() -> None:
    def values(attach_to: list[str] | None) -> Tensor:
        providers = {"feature_transform": {"attach_to": attach_to}}
        return on_ranks(Setting({"clip": 1.0, "decoupled": 1.0}, providers), 1)["value"]

    plain = on_ranks(Setting({"clip": 1.0, "decoupled": 1.0}), 1)["value"]
    to_clip, to_decoupled, to_both = values(["clip"]), values(["decoupled"]), values(None)
    assert to_clip != plain
    torch.testing.assert_close(to_clip + to_decoupled - plain, to_both)


def refused() -> str:
    try:
        Exchange(World.current(), SimilarityConfig(group_ranks=2))
    except UserError as error:
        return str(error)
    return ""


def test_groups_that_the_ranks_do_not_make_are_refused() -> None:
    assert run_ranks(refused, 3) == ["similarity.group_ranks: 3 ranks do not make groups of 2"] * 3


def test_the_fixture_has_pairs_that_are_nearer_than_chance() -> None:
    """The rows that all definitions are compared on: of length 1, positives above the rest."""
    found = defined(Setting({"clip": 1.0}), lambda whole: (whole.image * whole.text).sum(1).mean())
    assert found["value"] > 0.3
    torch.testing.assert_close(unit(torch.tensor([[3.0, 4.0]])).norm(), torch.tensor(1.0))
