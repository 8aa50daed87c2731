"""Every term and provider sees the same step whether its rows were embedded at once or in micro-batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from tests.vlm.objectives.batches import pair_terms
from tests.vlm.training.toy import GLOBAL_BATCH, Setup, start, toy_batch, toy_model
from vlm.batch import Batch, Counterfactuals, Texts, editor_key
from vlm.distributed.world import World
from vlm.objectives.objective import Objective
from vlm.objectives.recipe import Providers, Terms
from vlm.objectives.registry import PROVIDERS
from vlm.objectives.state import RunFacts
from vlm.training.accumulation import accumulate
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.teacher import Teacher, TeacherConfig

NUM_STEPS = 3
# Options with which a term has something to do at twelve rows.
SMALL: dict[str, dict[str, Any]] = {
    "clustered_negatives": {"form": "learned_weights", "hidden": 4},
    "hard": {"hardest": 0.4},
    "individual_temperature": {"temperature_init": 0.1, "rate": 0.001},
    "momentum_distillation": {"queue_size": 17, "ramp_epochs": 0.5},
    "counting": {"weight": 0.5, "as_negatives": True},
    "hard_negative_captions": {"form": "margin", "margin": 0.5, "largest_margin": 9.0},
    "ordering": {"num_negatives": 4},
    "multi_head": {"heads": 2, "hardest": 5, "hidden": 4},
    "multi_positive": {"by": "label"},
}
SMALL_PROVIDERS: dict[str, dict[str, Any]] = {
    "queue": {"size": 17},
    "mixed_negatives": {"hardest": 6, "mixed": 5, "mixed_with_query": 4},
    "feature_transform": {},
}


def batch_of(step: int) -> Batch:
    """A toy batch with labels, several captions an image, and counterfactuals of some by two editors."""
    batch = toy_batch(step, 0, 1)
    rows = torch.tensor([row for row in range(GLOBAL_BATCH) for _ in range(1 + row % 3)])
    tokens = torch.randint(0, 50, (len(rows), 5), generator=torch.Generator().manual_seed(step))
    first = torch.tensor([index == 0 or rows[index] != rows[index - 1] for index in range(len(rows))])
    tokens[first] = batch.texts.tokens
    captions = Texts(tokens, torch.full((len(rows),), 5), owners=rows)
    owners = torch.arange(0, GLOBAL_BATCH, 2)
    editors = torch.tensor([editor_key("number"), editor_key("colour")])[torch.arange(len(owners)) % 2]
    edited = Counterfactuals((tokens[: len(owners)] + 7) % 50, torch.full((len(owners),), 5), editors, owners=owners)
    parts = {**batch.parts, "captions": captions, "counterfactuals": edited}
    return replace(batch, labels=torch.arange(GLOBAL_BATCH) % 5, parts=parts)


def steps(terms: dict[str, Any], providers: dict[str, Any], rows: int | None) -> list[dict[str, Tensor]]:
    """Loss and gradients of three steps; weights move by plain descent between them."""
    facts = RunFacts(dim=16, num_samples=40, num_steps=10, steps_per_epoch=4, seed=0, world=World())
    objective = Objective(
        TypeAdapter(Terms).validate_python(terms), TypeAdapter(Providers).validate_python(providers), facts=facts
    )
    model = toy_model(Setup(double=True), objective.parameters())
    if "sigmoid" in terms:
        model.logit_bias = nn.Parameter(torch.tensor([-4.0], dtype=torch.float64))
    engine = start(Setup(double=True), 1, model)
    teacher = Teacher(TeacherConfig(decay=0.9), engine) if objective.needs.teacher_outputs else None
    told = []
    for step in range(NUM_STEPS):
        plan = MicroBatchPlan(GLOBAL_BATCH, 1, rows)
        found = accumulate(engine, objective, batch_of(step), plan, seed=0, teacher=teacher)
        told.append({"loss": found.loss, **{name: engine.gradient(name).clone() for name in engine.parameters()}})
        engine.step(1e-3)
        objective.commit()
        if teacher:
            teacher.update(step)
    return told


def assert_same_steps(terms: dict[str, Any], providers: dict[str, Any]) -> None:
    at_once = steps(terms, providers, None)
    in_parts = steps(terms, providers, 5)
    for expected, found in zip(at_once, in_parts, strict=True):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[misc]


@pytest.mark.parametrize("name", [*pair_terms(), "counting", "hard_negative_captions"])
def test_a_term_of_micro_batches_is_that_of_the_whole_rows(name: str) -> None:
    assert_same_steps({name: SMALL.get(name, {})}, {})


@pytest.mark.parametrize("name", sorted(PROVIDERS.all()))
def test_a_provider_of_micro_batches_is_that_of_the_whole_rows(name: str) -> None:
    assert_same_steps({"clip": 1.0, "decoupled": 0.5}, {name: SMALL_PROVIDERS.get(name, {})})


def test_all_captions_of_an_image_go_through_micro_batches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_steps({"multi_positive": {"captions": "all", "by": "sample"}}, {})
