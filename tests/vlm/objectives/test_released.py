"""A step's graph is gone after its backward: neither terms nor providers hold on to what they compared."""

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn.functional import normalize

from tests.vlm.objectives.batches import batch_of, outputs_of, pair_terms
from vlm.batch import Counterfactuals, editor_key
from vlm.distributed.world import World
from vlm.objectives.objective import Objective
from vlm.objectives.recipe import Providers, Terms
from vlm.objectives.registry import PROVIDERS
from vlm.objectives.state import RunFacts

ROWS, DIM = 6, 24


def take_step(objective: Objective, step: int) -> None:
    generator = torch.Generator().manual_seed(step)

    def rows() -> torch.Tensor:
        return normalize(torch.randn(ROWS, DIM, generator=generator).requires_grad_(), dim=1)

    tokens = torch.randint(1, 9, (ROWS, 3), generator=generator)
    ids = torch.arange(ROWS)
    batch = batch_of(ids, step=step, tokens=tokens, labels=ids // 2, caption_owners=ids)
    counterfactuals = Counterfactuals(tokens + 9, torch.full((ROWS,), 3), ids * 0 + editor_key("colour"), owners=ids)
    batch = replace(batch, parts={**batch.parts, "counterfactuals": counterfactuals})
    scale, bias = torch.full((1,), 10.0, requires_grad=True), torch.full((1,), -10.0, requires_grad=True)
    own = {name: value.clone().requires_grad_() * 1 for name, value in objective.parameters().items()}
    text = rows()
    outputs = outputs_of(rows(), text, scale * 1, bias * 1, captions=text, parameters=own)
    outputs["counterfactuals"] = rows()
    teacher = outputs_of(rows().detach(), text.detach(), scale.detach(), bias.detach(), captions=text.detach())
    total, _ = objective.evaluate(outputs, batch, teacher=teacher)
    total.backward()
    objective.commit()


def living() -> int:
    gc.collect()
    return sum(issubclass(type(held), torch.Tensor) for held in gc.get_objects())


@pytest.fixture(scope="module")
def nothing_older() -> Iterator[None]:
    """Objects of before are neither collected nor counted, which would take seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_older")
@pytest.mark.parametrize("name", [*pair_terms(), "hard_negative_captions", *PROVIDERS.all()])
def test_later_steps_keep_no_more_tensors_than_earlier_ones(name: str) -> None:
    attached = name in PROVIDERS.all()
    objective = Objective(
        TypeAdapter(Terms).validate_python({"clip" if attached else name: 1.0}),
        TypeAdapter(Providers).validate_python({name: {}} if attached else {}),
        facts=RunFacts(DIM, ROWS, 10, 1, 0, World()),
    )
    take_step(objective, 0)
    take_step(objective, 1)
    before = living()
    for step in range(2, 5):
        take_step(objective, step)
    assert living() <= before
