"""Momentum distillation: ALBEF's value, what its keys and targets are, and that ranks and restarts change nothing."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.parity import D, N, Setting, Whole, assert_same, defined, leaves, on_ranks, unit
from vlm.distributed.world import World
from vlm.objectives.objective import Objective
from vlm.objectives.state import RunFacts
from vlm.objectives.terms.momentum_distillation import MomentumDistillation

SIZE = 17  # of the 22 keys of two steps
# The third of four steps over which alpha grows: half of it.
OPTIONS = {"alpha": 0.8, "ramp_epochs": 0.8, "queue_size": SIZE}
DISTILLED = Setting({"momentum_distillation": OPTIONS}, num_steps=3)


def definition(whole: Whole, queue_size: int = SIZE, alpha: float = 0.4, groups: tuple[range, ...] = ()) -> Tensor:
    """Entry by entry: log-probabilities of the model under the targets, keys being the teacher's."""
    past = [leaves(DISTILLED, step) for step in range(2)]
    total = torch.zeros((), dtype=torch.float64)
    directions = (
        (whole.image, whole.teacher_image, whole.teacher_text, "teacher_text"),
        (whole.text, whole.teacher_text, whole.teacher_image, "teacher_image"),
    )
    for rows, teacher_rows, teacher_keys, name in directions:
        queue = torch.cat([unit(step[name]) for step in past])[len(past) * N - queue_size :].float().double()
        for i in range(N):
            group = next((group for group in groups if i in group), range(N))
            keys = [teacher_keys[j] for j in group] + list(queue)
            logits = torch.stack([whole.scale[0] * (rows[i] @ key) for key in keys])
            teacher_logits = torch.stack([whole.scale[0].detach() * (teacher_rows[i] @ key) for key in keys])
            targets = alpha * (teacher_logits - torch.logsumexp(teacher_logits, 0)).exp()
            targets[group.index(i)] += 1 - alpha
            total = total - (targets * (logits - torch.logsumexp(logits, 0))).sum()
    return total / (2 * N)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_value_and_gradients_equal_the_definition_over_several_steps(world_size: int, scale: float) -> None:
    setting = replace(DISTILLED, scale=scale)
    assert_same(on_ranks(setting, world_size), defined(setting, definition, step=2))


def test_without_a_queue_keys_are_those_of_the_batch_on_all_ranks() -> None:
    setting = replace(DISTILLED, terms={"momentum_distillation": {**OPTIONS, "queue_size": 0}})
    expected = defined(setting, lambda whole: definition(whole, queue_size=0), step=2)
    for world_size in (1, 3):
        assert_same(on_ranks(setting, world_size), expected)


def test_groups_of_ranks_have_keys_of_their_own_and_one_queue() -> None:
    setting = replace(DISTILLED, similarity={"group_ranks": 2})
    groups = (range(4), range(4, N))  # ranks of 3, 1, 5 and 2 rows
    assert_same(on_ranks(setting, 4), defined(setting, lambda whole: definition(whole, groups=groups), step=2))


def test_alpha_grows_linearly_over_the_first_epochs_and_then_stays() -> None:
    """Five steps an epoch; the third step is number 2."""
    for ramp_epochs, share in ((0.0, 1.0), (0.4, 1.0), (1.0, 0.4), (2.0, 0.2)):
        setting = replace(DISTILLED, terms={"momentum_distillation": {**OPTIONS, "ramp_epochs": ramp_epochs}})
        expected = defined(setting, lambda whole, share=share: definition(whole, alpha=0.8 * share), step=2)  # type: ignore[misc]
        assert_same(on_ranks(setting, 1), expected)
    first = replace(DISTILLED, num_steps=1, terms={"momentum_distillation": {**OPTIONS, "queue_size": 0}})
    assert_same(on_ranks(first, 1), defined(first, lambda whole: definition(whole, queue_size=0, alpha=0.0)))


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "expected"), [(0.4, 0.351439), (0.0, 0.223592)])
def test_the_loss_of_a_two_by_two_fixture(alpha: float, expected: float) -> None:
    """Texts are orthogonal to all image keys, so that their direction costs log 2 whatever the targets."""
    outputs = outputs_of(
        rows([0.9, 0.1, 0.0], [0.2, 0.8, 0.0]),
        rows([0.0, 0.0, 1.0], [0.0, 0.0, 1.0]),
        torch.tensor([2.0], dtype=torch.float64),
    )
    teacher = outputs_of(
        rows([0.85, 0.15, 0.0], [0.25, 0.75, 0.0]), rows([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]), outputs["logit_scale"]
    )
    objective = Objective({"md": MomentumDistillation(alpha=alpha, ramp_epochs=0, queue_size=0)}, facts=facts(3))
    value, _ = objective.evaluate(outputs, batch_of(2), teacher=teacher)
    assert 2 * value.item() - math.log(2) == pytest.approx(expected, abs=1e-6)


def test_with_the_model_as_its_teacher_no_queue_and_no_softening_it_is_the_clip_loss() -> None:
    outputs = embedded(0)
    objective = Objective({"md": MomentumDistillation(alpha=0, queue_size=0)}, facts=facts())
    value, _ = objective.evaluate(outputs, batch_of(N), teacher=outputs)
    logits = outputs["logit_scale"] * outputs["image"] @ outputs["text"].T
    targets = torch.arange(N)
    expected = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_a_restored_run_goes_on_as_if_nothing_had_been() -> None:
    term = MomentumDistillation(queue_size=SIZE)
    straight, saved, resumed = (Objective({"md": term}, facts=facts()) for _ in range(3))
    for step in range(2):
        for objective in (straight, saved):
            objective.evaluate(embedded(step), batch_of(N, step=step), teacher=embedded(step + 10))
            objective.commit()
    tensors = {name: tensor.clone() for name, tensor in saved.states["md"].replicated().items()}
    resumed.states["md"].restore(tensors, [{}])
    for step in (2, 3):
        values = []
        for objective in (straight, resumed):
            values.append(objective.evaluate(embedded(step), batch_of(N, step=step), teacher=embedded(step + 10))[0])
            objective.commit()
        assert torch.equal(values[0], values[1])
    fresh = Objective({"md": term}, facts=facts())
    assert fresh.evaluate(embedded(3), batch_of(N, step=3), teacher=embedded(13))[0] < values[0]  # fewer keys


def facts(dim: int = D) -> RunFacts:
    return RunFacts(dim=dim, num_samples=40, num_steps=10, steps_per_epoch=5, seed=0, world=World())


def embedded(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (unit(torch.randn(N, D, dtype=torch.float64, generator=generator)) for _ in range(2))
    return outputs_of(image, text, torch.tensor([10.0], dtype=torch.float64))
