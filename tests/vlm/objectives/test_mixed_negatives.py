"""Mixed negatives: the paper's mixtures, drawn alike at any world size, and negatives that teach the query alone."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.vlm.objectives.batches import batch_of, outputs_of
from tests.vlm.objectives.parity import N, Setting, Whole, assert_defined_by, assert_same, on_ranks, unit
from vlm.distributed.world import World
from vlm.objectives.counter_rng import uniforms
from vlm.objectives.providers import extra_negatives
from vlm.objectives.providers.mixed_negatives import MixedNegatives, Mixtures
from vlm.objectives.step import pair_step
from vlm.similarity.exchange import Exchange

HARDEST, MIXED, WITH_QUERY = 5, 4, 3
MIXING = Setting(
    {"clip": 1.0},
    {"mixed_negatives": {"hardest": HARDEST, "mixed": MIXED, "mixed_with_query": WITH_QUERY}},
    ids=(7, 3, 11, 5, 20, 2, 31, 8, 7, 40, 3),  # two samples are there twice
)


def mixtures(query: Tensor, negatives: list[Tensor], drawn: list[float]) -> list[Tensor]:
    """The synthetic negatives of one query, one by one, from its 3 s + 2 s' uniform numbers."""
    query, negatives = query.detach(), [n.detach() for n in negatives]
    nearest = sorted(negatives, key=lambda n: -float(query @ n))[:HARDEST]
    firsts, seconds, alphas = drawn[:MIXED], drawn[MIXED : 2 * MIXED], drawn[2 * MIXED : 3 * MIXED]
    thirds, betas = drawn[3 * MIXED : 3 * MIXED + WITH_QUERY], drawn[3 * MIXED + WITH_QUERY :]
    found = []
    for first, second, alpha in zip(firsts, seconds, alphas, strict=True):
        i = math.floor(first * len(nearest))
        others = [*nearest[i + 1 :], *nearest[:i]]
        j = math.floor(second * len(others))
        found.append(alpha * nearest[i] + (1 - alpha) * others[j])
    for third, beta in zip(thirds, betas, strict=True):
        found.append(beta / 2 * query + (1 - beta / 2) * nearest[math.floor(third * len(nearest))])
    return [h / h.norm() for h in found]


def entries(whole: Whole) -> list[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """Of each query in either direction: its positive's similarity, its negatives' and its synthetic negatives'."""
    found = []
    directions: tuple[tuple[str, Tensor, Tensor], ...] = (
        ("text", whole.image, whole.text),
        ("image", whole.text, whole.image),
    )
    for others, rows, columns in directions:
        drawn = uniforms(0, 0, whole.ids, f"mixed_negatives/{others}", 3 * MIXED + 2 * WITH_QUERY).tolist()
        for i in range(N):
            negatives = [columns[j] for j in range(N) if whole.ids[j] != whole.ids[i]]
            synthetic = mixtures(rows[i], negatives, drawn[i])
            found.append((rows[i] @ columns[i], [rows[i] @ n for n in negatives], [rows[i] @ h for h in synthetic]))
    return found


def clip_with_mixtures(whole: Whole) -> Tensor:
    losses = [
        torch.logsumexp(whole.scale * torch.stack([positive, *negatives, *synthetic]), 0) - whole.scale[0] * positive
        for positive, negatives, synthetic in entries(whole)
    ]
    return torch.stack(losses).sum() / (2 * N)


@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
def test_value_and_gradients_equal_the_papers_mixtures_at_any_world_size(scale: float) -> None:
    assert_defined_by(replace(MIXING, scale=scale), clip_with_mixtures)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra_negatives, "_BLOCK_NUMBERS", 100)  # two rows a block
    assert_defined_by(MIXING, clip_with_mixtures, (1,))


def test_the_sigmoid_loss_counts_every_mixture_as_a_question() -> None:
    def definition(whole: Whole) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for place, (positive, negatives, synthetic) in enumerate(entries(whole)):
            questions = [*(negatives if place < N else []), *synthetic]
            total = total + torch.log1p((whole.scale * torch.stack(questions) + whole.bias).exp()).sum()
            if place < N:
                total = total + torch.log1p((-whole.scale[0] * positive - whole.bias[0]).exp())
        return total / N

    assert_defined_by(replace(MIXING, terms={"sigmoid": 1.0}, scale=10.0), definition)


def test_without_mixtures_or_before_its_start_it_is_the_plain_loss() -> None:
    plain = on_ranks(replace(MIXING, providers={}), 1)
    none = {"mixed_negatives": {"mixed": 0, "mixed_with_query": 0}}
    assert_same(on_ranks(replace(MIXING, providers=none), 1), plain, tolerance=0)
    assert_same(on_ranks(replace(MIXING, providers={"mixed_negatives": {"start_step": 1}}), 1), plain, tolerance=0)
    assert on_ranks(MIXING, 1)["value"] > plain["value"]


def step_of(ids: list[int], seed: int = 0, step: int = 0, hardest: int = 16) -> Mixtures:
    generator = torch.Generator().manual_seed(1)
    image, text = (unit(torch.randn(len(ids), 8, generator=generator).double()) for _ in range(2))
    batch = batch_of(ids, step=step)
    outputs = outputs_of(image.requires_grad_(), text.requires_grad_(), torch.ones(1).double())
    options = MixedNegatives(hardest=hardest, mixed=40, mixed_with_query=30)
    return Mixtures(options, pair_step(outputs, batch, Exchange(World()), seed=seed))


@pytest.mark.parametrize("others", ["image", "text"])
def test_mixtures_have_unit_norm_and_those_with_the_query_are_nearer_to_it(others: str) -> None:
    ids = list(range(30))
    step = step_of(ids)
    found = step.block_negatives(slice(0, 30), others)
    assert found.shape == (30, 70, 8)
    torch.testing.assert_close(found.norm(dim=2), torch.ones(30, 70).double())
    pairs = step._pairs
    queries, columns = (pairs.x, pairs.y) if others == "text" else (pairs.y, pairs.x)
    nearest = (queries @ columns.T).fill_diagonal_(-math.inf).amax(1)  # with one to choose from, all mix with it
    found = step_of(ids, hardest=1).block_negatives(slice(0, 30), others)[:, 40:]
    similarities = (found @ queries[:, :, None])[:, :, 0]
    assert (similarities >= nearest[:, None]).all()
    assert similarities.amax() > nearest.amax()


def test_draws_change_with_step_and_seed_and_not_with_the_other_rows_of_a_block() -> None:
    first = step_of(list(range(30)))
    whole = first.block_negatives(slice(0, 30), "text")
    assert torch.equal(first.block_negatives(slice(7, 9), "text"), whole[7:9])
    assert not torch.equal(step_of(list(range(30)), step=1).block_negatives(slice(0, 30), "text"), whole)
    assert not torch.equal(step_of(list(range(30)), seed=1).block_negatives(slice(0, 30), "text"), whole)


def test_a_row_with_one_negative_mixes_it_alone_and_a_row_without_has_none() -> None:
    """Sample 1 meets one other; with copies of itself alone, a sample has nothing to mix."""
    one = step_of([1, 1, 2])
    texts = one._pairs.y.detach()
    torch.testing.assert_close(one.block_negatives(slice(0, 1), "text")[0, :40], texts[2].expand(40, -1))
    assert one.num_columns("text").tolist() == [70, 70, 70]
    none = step_of([1, 1])
    assert none.num_columns("text").tolist() == [0, 0]
    image = none._pairs.x
    value = none.log_sum_exp(image, "text", torch.ones(1).double())
    assert value.tolist() == [-math.inf, -math.inf]
    assert none.softplus_sum(image, "text", torch.ones(1).double(), torch.ones(1).double()).tolist() == [0, 0]
    value.nan_to_num(neginf=0.0).sum().backward()
    assert image.grad is not None
    assert not image.grad.any()
