"""The teacher embeds with the averaged weights and nothing random, and follows the weights by its decay from step 0."""

import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.training.toy import GLOBAL_BATCH, WHOLE, Setup, start, toy_batch, train_state
from vlm.outputs import PAIR, Outputs, joined
from vlm.training.micro_batches import MicroBatchPlan
from vlm.training.step import train_step
from vlm.training.teacher import Teacher, TeacherConfig

DECAY = 0.75


def story() -> tuple[list[dict[str, Tensor]], dict[str, Tensor], list[dict[str, Tensor]], Outputs, bool]:
    """The weights before each step and at the end, the teacher's, and embeddings of one batch with dropout on."""
    engine = start(Setup(dropout=0.5), 1)
    teacher = Teacher(TeacherConfig(decay=DECAY), engine)
    state = train_state(engine)
    engine.module.train()
    weights = [{name: engine.weight(name).clone() for name in engine.parameters()}]
    for step in range(3):
        train_step(state, toy_batch(step, 0, 1), WHOLE, seed=0, lr=1e-2)
        teacher.update(step)
        weights.append({name: engine.weight(name).clone() for name in engine.parameters()})
    batch = toy_batch(5, 0, 1)
    plans = (WHOLE, MicroBatchPlan(GLOBAL_BATCH, 1, 5))
    embedded = [joined(teacher.forward(plan.of(batch), PAIR)) for plan in plans]
    training = engine.module.training
    averages = {name: value.clone() for name, value in teacher.average.shards.items()}
    with torch.no_grad():
        for name, value in averages.items():
            engine.load_weight(name, value)
        engine.module.eval()
        expected = engine.module(batch.parts, PAIR)
    return weights, averages, embedded, expected, training


def test_it_is_the_average_with_its_decay_and_without_dropout() -> None:
    (told,) = run_ranks(story, 1, group=False)
    weights, averages, embedded, outputs, training = told
    for name, found in averages.items():
        expected = weights[0][name].double()
        for later in weights[1:]:
            expected = DECAY * expected + (1 - DECAY) * later[name].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    for one in embedded:
        for name in ("image", "text"):
            torch.testing.assert_close(one[name], outputs[name], rtol=1e-5, atol=1e-6)
    assert training  # and the model trains on with its dropout
