"""The teacher embeds with the averaged weights and nothing random, and follows the weights by its decay from step 0."""

import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.training.toy import WHOLE, Setup, learner_of, start, toy_batch
from vlm.encoded import Encoded
from vlm.training.step import train_step
from vlm.training.teacher import Teacher, TeacherConfig

DECAY = 0.75


def story() -> tuple[list[dict[str, Tensor]], dict[str, Tensor], list[Encoded], tuple[Tensor, Tensor], bool]:
    """The weights before each step and at the end, the teacher's, and embeddings of one batch with dropout on."""
    engine = start(Setup(dropout=0.5), 1)
    teacher = Teacher(TeacherConfig(decay=DECAY), engine)
    learner = learner_of(engine)
    engine.module.train()
    weights = [{name: engine.weight(name).clone() for name in engine.parameters()}]
    for step in range(3):
        train_step(learner, toy_batch(step, 0, 1), WHOLE, seed=0, lr=1e-2)
        teacher.update(step)
        weights.append({name: engine.weight(name).clone() for name in engine.parameters()})
    batch = toy_batch(5, 0, 1)
    embedded = [teacher.embed(batch, parts) for parts in ([(0, 12)], [(0, 5), (5, 12)])]
    training = engine.module.training
    averages = {name: value.clone() for name, value in teacher.average.shards.items()}
    with torch.no_grad():
        for name, value in averages.items():
            engine.load_weight(name, value)
        engine.module.eval()
        image, text, *_ = engine.module(batch.images, batch.tokens, batch.lengths)
    return weights, averages, embedded, (image, text), training


def test_it_is_the_average_with_its_decay_and_without_dropout() -> None:
    (told,) = run_ranks(story, 1, group=False)
    weights, averages, embedded, (image, text), training = told
    for name, found in averages.items():
        expected = weights[0][name].double()
        for later in weights[1:]:
            expected = DECAY * expected + (1 - DECAY) * later[name].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    for one in embedded:
        torch.testing.assert_close(one.image, image, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.text, text, rtol=1e-5, atol=1e-6)
    assert training  # and the model trains on with its dropout
