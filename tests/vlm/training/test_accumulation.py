"""Two passes over micro-batches: the gradient of one graph over the same rows with the same dropout."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.training.toy import Setup, ToyEncoder, start, toy_batch
from vlm.encoded import Encoded
from vlm.objectives.clip import Clip
from vlm.objectives.objective import Objective
from vlm.objectives.pairs import Pairs
from vlm.objectives.term import Term
from vlm.similarity.exchange import Exchange
from vlm.training.accumulation import MicroBatches, accumulate
from vlm.training.engine import EngineName
from vlm.training.randomness import seed_step
from vlm.training.teacher import micro_batches

ROWS = 11
STEP = 3
DROPPED = Setup(dropout=0.4, double=True)


class RowTerm(Term):
    """A term that compares no pairs: the mean of a function of each row."""

    pairwise: ClassVar[bool] = False

    def __call__(self, pairs: Pairs) -> Float[Tensor, ""]:
        return pairs.share((pairs.image**3).sum(1) + (pairs.text[:, 0] * pairs.logit_scale))


TERMS: dict[str, Term] = {"clip": Clip(label_smoothing=0.1), "rows": RowTerm(weight=0.3)}


def one_graph(setup: Setup, world_size: int, rows: int | None) -> dict[str, Tensor]:
    """The definition: every rank's micro-batches under their seeds, concatenated in one graph of one process."""
    model = ToyEncoder(setup.log_scale, setup.dropout)
    if setup.double:
        model.double()
    cuts = MicroBatches(ROWS, world_size, rows)
    images, texts = [], []
    for rank in range(world_size):
        batch = toy_batch(STEP, rank, world_size, ROWS)
        for number, (part, filled) in enumerate(micro_batches(batch, cuts.cut(len(batch.images)))):
            seed_step(0, STEP, rank, number)
            if filled:
                image, text, scale, _ = model(part.images, part.tokens, part.lengths)
                images.append(image)
                texts.append(text)
    encoded = Encoded(torch.cat(images), torch.cat(texts), scale)
    value, _ = Objective(TERMS).evaluate(encoded, toy_batch(STEP, 0, 1, ROWS))
    value.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **gradients}


def accumulated(setup: Setup, world_size: int, rows: int | None) -> dict[str, Tensor]:
    """Loss (the mean of the ranks' shares) and gradients under an engine."""
    engine = start(setup, world_size)
    objective = Objective(TERMS, exchange=Exchange(engine.world))
    batch = toy_batch(STEP, engine.world.rank, world_size, ROWS)
    found = accumulate(engine, objective, batch, MicroBatches(ROWS, world_size, rows), seed=0)
    gradients = {name: engine.gradient(name) for name in engine.parameters()}
    loss = engine.world.sum(found.loss) / world_size
    terms = {name: engine.world.sum(share) / world_size for name, share in found.terms.items()}
    engine.accelerator.end_training()
    return {"loss": loss, "weighted terms": terms["clip"] + 0.3 * terms["rows"], **gradients}


@pytest.mark.parametrize("rows", [1, 3, 4, 11, None])
def test_two_passes_equal_one_graph_with_the_same_dropout_in_float64(rows: int | None) -> None:
    expected, found = one_graph(DROPPED, 1, rows), accumulated(DROPPED, 1, rows)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(found["weighted terms"], found["loss"])


def test_without_dropout_micro_batches_change_nothing() -> None:
    expected = accumulated(replace(DROPPED, dropout=0.0), 1, None)
    for rows in (2, 5):
        for name, tensor in accumulated(replace(DROPPED, dropout=0.0), 1, rows).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world_size", "rows"),
    [("ddp", 2, 2), ("ddp", 3, 1), ("zero1", 2, 2), ("zero2", 2, 2), ("zero3", 2, 2), ("zero2", 3, 1)],
)
def test_every_engine_accumulates_to_the_gradient_of_one_graph(engine: EngineName, world_size: int, rows: int) -> None:
    """Eleven rows over two or three ranks: unequal rows, and with micro-batches of one row an empty one on a rank."""
    setup = Setup(engine, dropout=0.4, max_grad_norm=None)
    expected = one_graph(setup, world_size, rows)
    results: list[dict[str, Any]] = run_ranks(accumulated, world_size, setup, world_size, rows, group=False)
    for result in results:
        for name, tensor in expected.items():
            assert torch.linalg.norm(result[name] - tensor) <= 2e-6 * torch.linalg.norm(tensor), name


def test_the_number_of_forwards_is_the_same_on_every_rank() -> None:
    cuts = MicroBatches(global_batch=11, world_size=3, rows=1)
    assert cuts.count == 4
    assert cuts.cut(4) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert cuts.cut(3) == [(0, 0), (0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("global_batch", [1, 5, 11, 12])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 20])
def test_no_micro_batch_is_larger_than_asked_for(global_batch: int, world_size: int, rows: int) -> None:
    cuts = MicroBatches(global_batch, world_size, rows)
    for rank in range(world_size):
        own = global_batch // world_size + (rank < global_batch % world_size)
        parts = cuts.cut(own)
        assert [row for start, stop in parts for row in range(start, stop)] == list(range(own))
        assert max(stop - start for start, stop in parts) <= rows
