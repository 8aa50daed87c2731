"""Losses as functions of tensors are the terms, to the last digits, at one rank and at three uneven ones."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.ranks import run_ranks
from tests.vlm.objectives.batches import batch_of, outputs_of, pair_terms
from tests.vlm.objectives.parity import UNEVEN, D, N, Setting, leaves, whole
from vlm.distributed.world import World
from vlm.objectives import functional
from vlm.objectives.objective import Objective
from vlm.objectives.registry import TERMS
from vlm.objectives.state import RunFacts
from vlm.objectives.term import PairTerm
from vlm.objectives.terms.attract_repel import Sharpness
from vlm.similarity.config import SimilarityConfig
from vlm.similarity.exchange import Exchange

SETTING = Setting({}, ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3))
Rows = dict[str, Tensor]
# A term with its options, and the same loss as a function.
LOSSES: dict[str, tuple[dict[str, Any], Callable[[Rows, Exchange], Tensor]]] = {
    "clip": (
        {"label_smoothing": 0.1, "margin": 0.2},
        lambda r, e: functional.clip(*three(r), ids=r["ids"], label_smoothing=0.1, margin=0.2, ranks=e),
    ),
    "sigmoid": ({}, lambda r, e: functional.sigmoid(*three(r), r["bias"], ids=r["ids"], ranks=e)),
    "decoupled": (
        {"weighting": "von_mises", "sigma": 0.4},
        lambda r, e: functional.decoupled(*three(r), ids=r["ids"], sigma=0.4, ranks=e),
    ),
    "hard": ({"hardest": 0.4}, lambda r, e: functional.hard(*three(r), ids=r["ids"], hardest=0.4, ranks=e)),
    "group_excluded": ({}, lambda r, e: functional.group_excluded(*three(r), r["labels"], ids=r["ids"], ranks=e)),
    "multi_positive": (
        {"by": "label", "form": "mean_log"},
        lambda r, e: functional.multi_positive(*three(r), r["labels"], ids=r["ids"], form="mean_log", ranks=e),
    ),
    "supervised": (
        {"temperature": None},
        lambda r, e: functional.supervised(*three(r), r["labels"], ids=r["ids"], ranks=e),
    ),
    "continuous": (
        {"direction": "both", "sharpness": 2.0, "threshold": 0.1, "weights_from": "text"},
        lambda r, e: functional.continuous(
            *three(r), r["text"].detach(), ids=r["ids"], direction="both", sharpness=2.0, threshold=0.1, ranks=e
        ),
    ),
    "alignment": ({"alpha": 3.0}, lambda r, e: functional.alignment(*two(r), ids=r["ids"], alpha=3.0, ranks=e)),
    "uniformity": (
        {"t": 1.5, "cross": 0.3},
        lambda r, e: functional.uniformity(*two(r), ids=r["ids"], t=1.5, cross_factor=0.3, ranks=e),
    ),
    "cyclic": ({"in_modal": 0.5}, lambda r, e: functional.cyclic(*two(r), ids=r["ids"], in_modal=0.5, ranks=e)),
    "cross_correlation": (
        {"off_diagonal": 0.1},
        lambda r, e: functional.cross_correlation(*two(r), ids=r["ids"], off_diagonal=0.1, ranks=e),
    ),
    "ordering": (
        {"num_negatives": 3},
        lambda r, e: functional.ordering(*two(r), ids=r["ids"], num_negatives=3, ranks=e),
    ),
    "attract_repel": (
        {"by": "label", "cost": "rbf", "t_plus": 0.5},
        lambda r, e: functional.attract_repel(
            *two(r), Sharpness(0.5, rbf_t=2.0), groups=r["labels"], ids=r["ids"], ranks=e
        ),
    ),
}
# Terms that learn or remember, evaluated by themselves.
BY_TERM: dict[str, dict[str, Any]] = {
    "whitening": {"group_size": 2},
    "multi_head": {"heads": 2, "hardest": 3, "hidden": 4},
    "clustered_negatives": {"clusters": [3], "nearest": 2},
    "fast_clip": {},
    "individual_temperature": {"temperature_init": 0.2},
    "momentum_distillation": {"queue_size": 5, "ramp_epochs": 0},
}


def two(rows: Rows) -> tuple[Tensor, Tensor]:
    return rows["image"], rows["text"]


def three(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    return rows["image"], rows["text"], rows["scale"]


def local_rows(world: World) -> Rows:
    """This rank's rows of the fixture, as fresh leaves."""
    batch = whole(SETTING, leaves(SETTING))
    counts = UNEVEN[world.size]
    first = sum(counts[: world.rank])
    rows = slice(first, first + counts[world.rank])
    fresh = {name: getattr(batch, name)[rows].detach().requires_grad_() for name in ("image", "text")}
    fresh |= {name: getattr(batch, name).detach().requires_grad_() for name in ("scale", "bias")}
    teacher = {name: getattr(batch, name)[rows].detach() for name in ("teacher_image", "teacher_text")}
    return {**fresh, **teacher, "ids": batch.ids[rows], "labels": batch.labels[rows]}


def by_objective(name: str, options: dict[str, Any], rows: Rows, exchange: Exchange) -> Tensor:
    objective = Objective({name: TERMS.find(name).model_validate(options)}, exchange=exchange, facts=facts(exchange))
    parameters = {key: value.double() for key, value in objective.parameters().items()}
    outputs = outputs_of(rows["image"], rows["text"], rows["scale"], rows["bias"], parameters=parameters)
    teacher = {"image": rows["teacher_image"], "text": rows["teacher_text"]}
    return objective.evaluate(outputs, batch_of(rows["ids"], labels=rows["labels"]), teacher=teacher)[0]


def by_term(name: str, options: dict[str, Any], rows: Rows, exchange: Exchange) -> Tensor:
    term = TERMS.find(name).model_validate(options)
    assert isinstance(term, PairTerm)
    parameters = {key: value.double() for key, value in term.parameters(facts(exchange)).items()}
    return functional.from_term(
        term,
        *three(rows),
        bias=rows["bias"],
        ids=rows["ids"],
        labels=rows["labels"],
        teacher={"image": rows["teacher_image"], "text": rows["teacher_text"]},
        parameters=parameters,
        state=term.start(facts(exchange)),
        ranks=exchange,
    )


def facts(exchange: Exchange) -> RunFacts:
    return RunFacts(dim=D, num_samples=40, num_steps=10, steps_per_epoch=5, seed=0, world=exchange.world)


def largest_differences(similarity: dict[str, Any]) -> dict[str, float]:
    """How far value and gradients of each function are from the term's on this rank."""
    world = World.current()
    exchange = Exchange(world, SimilarityConfig(**similarity))
    differences = {}
    ways: dict[str, tuple[dict[str, Any], Callable[[Rows, Exchange], Tensor]]] = dict(LOSSES)
    for name, options in BY_TERM.items():
        ways[name] = options, lambda rows, exchange, n=name, o=options: by_term(n, o, rows, exchange)  # type: ignore[misc]
    for name, (options, function) in ways.items():
        expected, rows = local_rows(world), local_rows(world)
        values = by_objective(name, options, expected, exchange), function(rows, exchange)
        for value in values:
            value.backward()
        assert rows["image"].grad is not None
        assert rows["image"].grad.abs().sum() > 0
        gradients = [(expected[leaf].grad, rows[leaf].grad) for leaf in ("image", "text", "scale", "bias")]
        assert all((a is None) == (b is None) for a, b in gradients), name
        given = [(a, b) for a, b in [values, *gradients] if a is not None and b is not None]
        differences[name] = max(float((a - b).detach().abs().max()) for a, b in given)
    return differences


@pytest.mark.parametrize(
    ("world_size", "similarity"), [(1, {}), (3, {}), (3, {"exchange": "ring"})], ids=["one", "three", "ring of three"]
)
def test_a_function_is_the_term(world_size: int, similarity: dict[str, Any]) -> None:
    ranks = [largest_differences(similarity)] if world_size == 1 else run_ranks(largest_differences, 3, similarity)
    assert set(ranks[0]) == set(pair_terms())
    for differences in ranks:
        assert max(differences.values()) <= 1e-12, differences


def test_without_ids_and_ranks_it_is_the_loss_that_everybody_knows() -> None:
    rows = local_rows(World())
    logits = rows["scale"] * rows["image"] @ rows["text"].T
    expected = (cross_entropy(logits, torch.arange(N)) + cross_entropy(logits.T, torch.arange(N))) / 2
    torch.testing.assert_close(functional.clip(*three(rows)), expected, rtol=1e-12, atol=1e-12)


def test_every_function_is_documented_with_its_source() -> None:
    public = [value for name, value in vars(functional).items() if inspect.isfunction(value) and name[0] != "_"]
    own = [function for function in public if function.__module__ == functional.__name__]
    assert len(own) == len(LOSSES) + 3
    for function in own:
        assert function.__doc__
        assert "see `" in function.__doc__ or "`term" in function.__doc__, function
