"""The queue of teacher embeddings: what a step sees, what lasts, and that ranks and restarts change nothing."""

from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from tests.ranks import run_ranks
from tests.vlm.objectives import parity
from tests.vlm.objectives.parity import UNEVEN, D, N, Setting, Whole, assert_same, defined, leaves, on_ranks, unit
from vlm.distributed.world import World
from vlm.objectives.objective import Objective
from vlm.objectives.providers.queue import EmbeddingQueue, Keys
from vlm.objectives.recipe import Providers, Terms
from vlm.objectives.state import RunFacts
from vlm.similarity.exchange import Exchange

SIZE = 17  # of the 22 keys of two steps
QUEUED = Setting({"clip": 1.0}, {"queue": {"size": SIZE}}, num_steps=3)


def remembered(setting: Setting) -> Keys:
    """The last keys before the last step, from the list of all; the queue holds fp32."""
    steps = [leaves(setting, step) for step in range(setting.num_steps - 1)]
    image, text = (torch.cat([unit(step[name]) for step in steps]) for name in ("teacher_image", "teacher_text"))
    ids = torch.tensor(setting.ids * len(steps))
    return Keys(image[-SIZE:].float().double(), text[-SIZE:].float().double(), ids[-SIZE:])


def entries(whole: Whole, queue: Keys) -> list[tuple[Tensor, list[Tensor]]]:
    """Of each query in either direction its positive's similarity and those of its negatives, one by one."""
    found = []
    for rows, columns, keys in ((whole.image, whole.text, queue.text), (whole.text, whole.image, queue.image)):
        for i in range(N):
            negatives = [rows[i] @ columns[j] for j in range(N) if whole.ids[j] != whole.ids[i]]
            negatives += [rows[i] @ keys[j] for j in range(len(keys)) if queue.ids[j] != whole.ids[i]]
            found.append((rows[i] @ columns[i], negatives))
    return found


def clip_with_queue(whole: Whole) -> Tensor:
    losses = [
        torch.logsumexp(whole.scale * torch.stack([positive, *negatives]), 0) - whole.scale[0] * positive
        for positive, negatives in entries(whole, remembered(QUEUED))
    ]
    return torch.stack(losses).sum() / (2 * N)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_a_step_sees_the_last_keys_of_the_steps_before_it_but_never_its_own_sample(
    world_size: int, scale: float
) -> None:
    setting = replace(QUEUED, scale=scale)
    assert_same(on_ranks(setting, world_size), defined(setting, clip_with_queue, step=2))


def test_the_sigmoid_loss_counts_every_key_as_a_question() -> None:
    def sigmoid_with_queue(whole: Whole) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        queue = remembered(QUEUED)
        for rows, keys in ((whole.image, queue.text), (whole.text, queue.image)):
            for i in range(N):
                for j in range(SIZE):
                    if queue.ids[j] != whole.ids[i]:
                        logit = whole.scale[0] * (rows[i] @ keys[j]) + whole.bias[0]
                        total = total + torch.log1p(logit.exp())
        logits = whole.scale * whole.image @ whole.text.T + whole.bias
        signs = 2 * torch.eye(N, dtype=torch.float64) - 1
        return (total - torch.nn.functional.logsigmoid(signs * logits).sum()) / N

    setting = replace(QUEUED, terms={"sigmoid": 1.0}, scale=10.0)
    expected = defined(setting, sigmoid_with_queue, step=2)
    for world_size in (1, 3):
        assert_same(on_ranks(setting, world_size), expected)


def test_groups_of_ranks_share_one_queue() -> None:
    """Four ranks in groups of two: the batch's negatives are the group's, the queue's are everyone's."""

    def grouped(whole: Whole) -> Tensor:
        queue = remembered(QUEUED)
        total = torch.zeros((), dtype=torch.float64)
        for rows, columns, keys in ((whole.image, whole.text, queue.text), (whole.text, whole.image, queue.image)):
            for i in range(N):
                group = range(4) if i < 4 else range(4, N)
                positive = whole.scale[0] * (rows[i] @ columns[i])
                logits = [whole.scale[0] * (rows[i] @ columns[j]) for j in group]
                logits += [whole.scale[0] * (rows[i] @ keys[j]) for j in range(SIZE) if queue.ids[j] != whole.ids[i]]
                total = total + torch.logsumexp(torch.stack(logits), 0) - positive
        return total / (2 * N)

    setting = replace(QUEUED, similarity={"group_ranks": 2})
    assert UNEVEN[4] == (3, 1, 5, 2)
    assert_same(on_ranks(setting, 4), defined(setting, grouped, step=2))


def facts() -> RunFacts:
    return RunFacts(dim=D, num_samples=40, num_steps=10, steps_per_epoch=5, seed=0, world=World())


def keys(first: int, count: int) -> Keys:
    """Keys whose rows and ids say which they are."""
    ids = torch.arange(first, first + count)
    rows = ids[:, None].float().expand(-1, D)
    return Keys(rows, -rows, ids)


def push(queue: EmbeddingQueue, first: int, count: int) -> None:
    queue.propose(keys(first, count))
    queue.commit()


@pytest.mark.parametrize("counts", [(2, 2, 2, 2), (3, 4, 1, 5), (5, 5), (12,), (3, 12, 2), (0, 4)])
def test_it_holds_the_last_keys_whatever_the_batches(counts: tuple[int, ...]) -> None:
    queue, written = EmbeddingQueue(5, facts()), 0
    for count in counts:
        push(queue, written, count)
        written += count
        assert sorted(queue.keys.ids.tolist()) == list(range(max(written - 5, 0), written))
        assert torch.equal(queue.keys.image[:, 0], queue.keys.ids.float())
        assert torch.equal(queue.keys.text[:, 0], -queue.keys.ids.float())


def test_a_proposal_lasts_only_when_it_is_committed_and_only_once() -> None:
    queue = EmbeddingQueue(5, facts())
    queue.propose(keys(0, 2))
    assert not len(queue.keys.ids)
    queue.propose(keys(2, 2))
    queue.commit()
    queue.commit()
    assert queue.keys.ids.tolist() == [2, 3]


def test_it_goes_on_from_a_saved_state_as_if_nothing_had_been() -> None:
    straight, saved = EmbeddingQueue(5, facts()), EmbeddingQueue(5, facts())
    for queue in (straight, saved):
        push(queue, 0, 3)
        push(queue, 3, 4)
    resumed = EmbeddingQueue(5, facts())
    resumed.restore({name: tensor.clone() for name, tensor in saved.replicated().items()}, [{}])
    push(straight, 7, 2)
    push(resumed, 7, 2)
    for name, tensor in straight.replicated().items():
        assert torch.equal(resumed.replicated()[name], tensor)


@pytest.mark.parametrize(("size", "held"), [(3, [4, 5, 6]), (9, [2, 3, 4, 5, 6])])
def test_a_queue_of_another_size_takes_over_the_newest(size: int, held: list[int]) -> None:
    saved = EmbeddingQueue(5, facts())
    push(saved, 0, 7)
    resumed = EmbeddingQueue(size, facts())
    resumed.restore(saved.replicated(), [])
    assert sorted(resumed.keys.ids.tolist()) == held
    push(resumed, 7, 1)
    assert sorted(resumed.keys.ids.tolist()) == [*held, 7][-size:]


def test_a_checkpoint_without_a_queue_leaves_it_empty() -> None:
    queue = EmbeddingQueue(5, facts())
    queue.restore({}, [])
    assert not len(queue.keys.ids)


def saved_state() -> dict[str, Tensor]:
    """The state that a checkpoint would hold after three steps on these ranks."""
    world = World.current()
    counts = UNEVEN[world.size]
    rows = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
    objective = Objective(
        TypeAdapter(Terms).validate_python(QUEUED.terms),
        TypeAdapter(Providers).validate_python(QUEUED.providers),
        Exchange(world),
        replace(facts(), world=world),
    )
    for step in range(3):
        parity._evaluate(objective, QUEUED, leaves(QUEUED, step), {}, rows, step)
        objective.commit()
    return objective.states["queue"].replicated()


def test_every_rank_of_any_world_holds_the_same_so_a_run_resumes_at_another_size() -> None:
    alone = saved_state()
    for state in run_ranks(saved_state, 3):
        assert state.keys() == alone.keys()
        for name, tensor in alone.items():
            assert torch.equal(state[name], tensor)
