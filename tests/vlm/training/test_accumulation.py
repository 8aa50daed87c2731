"""Two passes over micro-batches: the gradient of one graph over the same rows with the same dropout."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.ranks import run_ranks
from tests.vlm.training.token_term import SeenTokens, TokenTerm
from tests.vlm.training.toy import Setup, start, toy_batch, toy_model
from vlm.batch import Batch
from vlm.distributed.world import World
from vlm.objectives.objective import Objective
from vlm.objectives.state import RunFacts
from vlm.objectives.term import Term
from vlm.objectives.terms.clip import Clip
from vlm.similarity.exchange import Exchange
from vlm.training.accumulation import LossOutput, accumulate
from vlm.training.engines.base import Engine
from vlm.training.engines.registry import EngineName
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.randomness import seed_step
from vlm.training.teacher import Teacher, TeacherConfig

ROWS = 13
STEP = 3
SMOOTHING, WEIGHT = 0.1, 0.3
DROPPED = Setup(dropout=0.4, double=True)
TERMS: dict[str, Term] = {"clip": Clip(label_smoothing=SMOOTHING), "tokens": TokenTerm(weight=WEIGHT)}
OUTPUTS = frozenset({"image", "text", "text_tokens"})


def facts(world: World) -> RunFacts:
    return RunFacts(dim=16, num_samples=40, num_steps=10, steps_per_epoch=4, seed=0, world=world)


def taught(text_weights: Tensor) -> Tensor:
    """The teacher's embeddings of tokens, beside the model's."""
    return 0.5 * text_weights + 0.1


def one_graph(setup: Setup, world_size: int, rows: int | None) -> dict[str, Tensor]:
    """The definition: every rank's micro-batches under their seeds in one graph, and the formulas written out."""
    model = toy_model(setup, {"tokens/vector": torch.linspace(-1, 1, 16)})
    plan = MicroBatchPlan(ROWS, world_size, rows)
    passed = []
    for rank in range(world_size):
        for micro_batch in plan.of(toy_batch(STEP, rank, world_size, ROWS)):
            seed_step(0, STEP, rank, micro_batch.number)
            if micro_batch.has_rows:
                passed.append(model(micro_batch.batch.parts, OUTPUTS))
    image, text, tokens = (
        torch.cat([outputs[name] for outputs in passed]) for name in ("image", "text", "text_tokens")
    )
    logits = model.logit_scale.exp() * image @ text.T
    ways = [cross_entropy(way, torch.arange(ROWS), label_smoothing=SMOOTHING) for way in (logits, logits.T)]
    clip = (ways[0] + ways[1]) / 2
    texts = toy_batch(STEP, 0, 1, ROWS).texts
    vector, weights = model.term_parameters["tokens__of__vector"], taught(model.text.weight.detach())
    losses = [
        (tokens[i, k] @ vector - 1) ** 2 + ((tokens[i, k] - weights[texts.tokens[i, k]]) ** 2).sum()
        for i in range(ROWS)
        for k in range(int(texts.lengths[i]))
    ]
    value = clip + WEIGHT * torch.stack(losses).mean()
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), "seen": torch.tensor([len(losses)]), **gradients}


def begin(setup: Setup, world_size: int) -> tuple[Engine, Objective, Batch, Teacher]:
    engine = start(setup, world_size, toy_model(setup, {"tokens/vector": torch.linspace(-1, 1, 16)}))
    objective = Objective(TERMS, exchange=Exchange(engine.world), facts=facts(engine.world))
    teacher = Teacher(TeacherConfig(decay=0.9), engine)
    teacher.average.load("text.weight", taught(engine.weight("text.weight")))
    return engine, objective, toy_batch(STEP, engine.world.rank, world_size, ROWS), teacher


def accumulated(setup: Setup, world_size: int, rows: int | None) -> dict[str, Tensor]:
    """Loss (the mean of the ranks' parts) and gradients under an engine, and the tokens that were seen."""
    engine, objective, batch, teacher = begin(setup, world_size)
    result: LossOutput = accumulate(engine, objective, batch, MicroBatchPlan(ROWS, world_size, rows), 0, teacher)
    objective.commit()
    gradients = {name: engine.gradient(name) for name in engine.parameters()}
    loss = engine.world.sum(result.loss) / world_size
    terms = {name: engine.world.sum(part) / world_size for name, part in result.terms.items()}
    engine.accelerator.end_training()
    seen = objective.states["tokens"]
    assert isinstance(seen, SeenTokens)
    weighted = terms["clip"] + WEIGHT * terms["tokens"]
    return {"loss": loss, "weighted terms": weighted, "seen": seen.total, **gradients}


@pytest.mark.parametrize("rows", [1, 3, 5, 13, None])
def test_two_passes_equal_one_graph_with_the_same_dropout_in_float64(rows: int | None) -> None:
    expected, found = one_graph(DROPPED, 1, rows), accumulated(DROPPED, 1, rows)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")  # type: ignore[misc]
    torch.testing.assert_close(found["weighted terms"], found["loss"])


def test_without_dropout_micro_batches_change_nothing() -> None:
    expected = accumulated(replace(DROPPED, dropout=0.0), 1, None)
    for rows in (2, 5):
        for name, tensor in accumulated(replace(DROPPED, dropout=0.0), 1, rows).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size", "rows"),
    [
        ("ddp", 2, 2),
        ("ddp", 3, 1),
        ("zero1", 2, 2),
        ("zero2", 2, None),
        ("zero3", 2, 3),
        ("zero2", 3, 1),
        ("zero3", 3, 2),
        ("fsdp", 2, 3),
    ],
)
def test_every_engine_accumulates_to_the_gradient_of_one_graph(
    engine: EngineName, world_size: int, rows: int | None
) -> None:
    """Thirteen rows over two or three ranks: unequal rows, and with micro-batches of one row an empty one on a rank."""
    setup = Setup(engine, dropout=0.4, max_grad_norm=None)
    expected = one_graph(setup, world_size, rows)
    results: list[dict[str, Any]] = run_ranks(accumulated, world_size, setup, world_size, rows, group=False)
    for result in results:
        assert torch.equal(result.pop("seen"), expected["seen"])
        for name in result.keys() & expected.keys():
            assert torch.linalg.norm(result[name] - expected[name]) <= 2e-6 * torch.linalg.norm(expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rows"), [("ddp", None), ("ddp", 2), ("ddp", 1), ("fsdp", None), ("fsdp", 1)])
def test_three_uneven_ranks_are_one_process_in_float64(engine: EngineName, rows: int | None) -> None:
    """One, three and five micro-batches a rank, with uneven tokens, a teacher, a state. (DeepSpeed has no float64.)"""
    setup = Setup(engine, double=True, max_grad_norm=None)
    expected = one_graph(setup, 1, None)
    for result in run_ranks(accumulated, 3, setup, 3, rows, group=False):
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-10, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}")  # type: ignore[misc]


COLLECTIVES = (
    *("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_object", "broadcast"),
    *("all_gather_single", "reduce_scatter_single"),  # FSDP2's
)


def collectives_of_a_step(setup: Setup, rows: int | None) -> Counter[str]:
    """The collectives that a step calls beside the engine's own."""
    engine, objective, batch, teacher = begin(setup, 2)
    counted: Counter[str] = Counter()

    def counting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def count(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            return collective(*arguments, **options)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        accumulate(engine, objective, batch, MicroBatchPlan(ROWS, 2, rows), 0, teacher)
    engine.accelerator.end_training()
    return counted


def test_collectives_do_not_grow_with_the_number_of_micro_batches() -> None:
    one, three, six = (run_ranks(collectives_of_a_step, 2, Setup(), rows, group=False)[0] for rows in (None, 2, 1))
    assert one == three == six
    assert one["all_reduce"] > 0


@pytest.mark.slow
def test_sharded_gradients_travel_once_a_step() -> None:
    """Shards are gathered for each forward; gradients wait for the last micro-batch, one collective a sharded part."""
    one, three = (run_ranks(collectives_of_a_step, 2, Setup("fsdp"), rows, group=False)[0] for rows in (None, 2))
    assert one["reduce_scatter_single"] == three["reduce_scatter_single"] == 3  # image, text, and the rest
    assert one["all_reduce"] == three["all_reduce"]
    assert one["all_gather_single"] < three["all_gather_single"]


def test_the_number_of_forwards_is_the_same_on_every_rank() -> None:
    plan = MicroBatchPlan(global_batch=11, world_size=3, rows=1)
    assert plan.count == 4
    assert plan.bounds(4) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert plan.bounds(3) == [(0, 0), (0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("global_batch", [1, 5, 11, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 20])
def test_no_micro_batch_is_larger_than_asked_for(global_batch: int, world_size: int, rows: int) -> None:
    plan = MicroBatchPlan(global_batch, world_size, rows)
    for rank in range(world_size):
        num_rows = global_batch // world_size + (rank < global_batch % world_size)
        bounds = plan.bounds(num_rows)
        assert [row for start, stop in bounds for row in range(start, stop)] == list(range(num_rows))
        assert max(stop - start for start, stop in bounds) <= rows
