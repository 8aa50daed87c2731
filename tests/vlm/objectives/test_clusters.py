"""Clusters over ranks, the weights they give, and the sums in which a cluster's mean stands for its members."""

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from vlm.distributed.row_group import RowGroup
from vlm.distributed.world import World
from vlm.objectives.terms import clusters, meta_nodes
from vlm.objectives.terms.clusters import ClustersApart, spherical_k_means
from vlm.objectives.terms.meta_nodes import meta_node_log_sum_exp
from vlm.similarity.entry_weights import EqualKeys

COUNTS = {1: (30,), 3: (12, 5, 13)}
KEYS = torch.rand(30, generator=torch.Generator().manual_seed(9))


def unit_rows(count: int, dim: int = 4, seed: int = 0, groups: int | None = None, spread: float = 0.05) -> Tensor:
    """Random unit rows, or rows near `groups` of them in turn."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups or count, dim, dtype=torch.float64, generator=generator)
    rows = rows / rows.norm(dim=1, keepdim=True)
    if groups:
        rows = rows.repeat(-(-count // groups), 1)[:count]
        rows = rows + spread * torch.randn(count, dim, dtype=torch.float64, generator=generator)
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def labels_on_this_rank(count: int, iterations: int, rows: Tensor | None = None) -> Tensor:
    world = World.current()
    ranks = RowGroup(None, world.rank, COUNTS[world.size])
    return spherical_k_means(unit_rows(30) if rows is None else rows, ranks, KEYS, count, iterations)


@pytest.mark.parametrize("iterations", [0, 4])
def test_all_ranks_find_the_clusters_that_one_finds(iterations: int) -> None:
    alone = labels_on_this_rank(6, iterations)
    for labels in run_ranks(labels_on_this_rank, 3, 6, iterations):
        assert labels.tolist() == alone.tolist()


@pytest.mark.parametrize("num_equal", [1, 4])
def test_iterations_are_those_of_lloyd(monkeypatch: pytest.MonkeyPatch, num_equal: int) -> None:
    """Where some of the first centres are equal, all but the first of these have no members and stay."""
    monkeypatch.setattr(clusters, "_BLOCK", 7)
    rows = unit_rows(30)
    first = sorted(range(30), key=lambda i: KEYS[i].item())
    rows[first[:num_equal]] = rows[first[0]].clone()
    centres = [rows[i] for i in first[:6]]
    empty = 0
    for _ in range(4):
        members: list[list[int]] = [[] for _ in centres]
        for i in range(30):
            members[max(range(6), key=lambda c: (rows[i] @ centres[c]).item())].append(i)
        empty += members.count([])
        means = [sum((rows[i] for i in some), start=torch.zeros(4)) for some in members]
        centres = [mean / mean.norm() if some else old for mean, some, old in zip(means, members, centres, strict=True)]
    expected = [max(range(6), key=lambda c: (rows[i] @ centres[c]).item()) for i in range(30)]
    assert (empty > 0) == (num_equal > 1)
    assert labels_on_this_rank(6, 4, rows).tolist() == expected


def test_as_many_clusters_as_rows_leave_each_row_alone_even_equal_ones() -> None:
    rows = torch.ones(5, 4) / 2
    assert spherical_k_means(rows, RowGroup(None, 0, (5,)), KEYS[:5], 5, 3).unique().numel() == 5


def test_an_entry_weighs_as_many_clusterings_as_hold_it_apart() -> None:
    rows, columns = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[0, 1], [0, 0], [2, 0]])
    expected = torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 1.0]])
    weights = ClustersApart(rows, columns)
    values, logs = torch.full((2, 3), 3.0), torch.ones(2, 3)
    weights.multiply(values, values, slice(0, 2), slice(0, 3))
    weights.add_logs(logs, logs, slice(0, 2), slice(0, 3))
    torch.testing.assert_close(values, 3 * expected, rtol=0, atol=0)
    torch.testing.assert_close(logs, 1 + expected.log())


def written_out(x: Tensor, y: Tensor, labels: list[int], keys: list[int], scale: Tensor, nearest: int) -> Tensor:
    """Row by row, over lists of what is near, and of what is left of each cluster."""
    results = []
    for i in range(len(x)):
        similarities = {j: x[i] @ y[j] for j in range(len(y)) if keys[j] != keys[i]}
        order = sorted(similarities, key=lambda j: -similarities[j].item())
        parts = [(scale * similarities[j]).exp() for j in order[:nearest]]
        for cluster in set(labels):
            left = [similarities[j] for j in order[nearest:] if labels[j] == cluster]
            if left:
                parts.append(len(left) * (scale * torch.stack(left).mean()).exp())
        results.append(torch.cat(parts).sum().log() if parts else torch.tensor(float("-inf")).double())
    return torch.stack(results)


@pytest.mark.parametrize("nearest", [0, 2, 5, 40])
@pytest.mark.parametrize("keys", [list(range(30)), [i % 11 for i in range(30)], [i % 2 for i in range(30)]])
def test_meta_nodes_and_their_gradients_equal_a_double_loop(
    monkeypatch: pytest.MonkeyPatch, nearest: int, keys: list[int]
) -> None:
    monkeypatch.setattr(meta_nodes, "ROW_BLOCK", 8)
    x, y = unit_rows(30, seed=1).requires_grad_(), unit_rows(30, seed=2).requires_grad_()
    scale = torch.tensor([8.0], dtype=torch.float64, requires_grad=True)
    labels = [i * i % 5 for i in range(30)]
    excluded = EqualKeys(torch.tensor(keys), torch.tensor(keys))
    factors = torch.linspace(-1, 2, 30, dtype=torch.float64)
    results = []
    for logs in (
        meta_node_log_sum_exp(x, y, torch.tensor(labels), scale, excluded, nearest),
        written_out(x, y, labels, keys, scale, nearest),
    ):
        results.append((logs, *torch.autograd.grad((logs * factors).sum(), (x, y, scale))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_meta_nodes_sum_to_at_most_the_exact_sum_and_tight_clusters_to_nearly_all() -> None:
    labels = torch.arange(60) % 6
    keys = torch.arange(60)
    gaps = []
    for spread in (0.3, 0.001):
        x, y = unit_rows(60, seed=3), unit_rows(60, seed=4, groups=6, spread=spread)
        scale = torch.tensor([10.0], dtype=torch.float64)
        logits = (scale * (x @ y.T)).fill_diagonal_(float("-inf"))
        gap = logits.logsumexp(1) - meta_node_log_sum_exp(x, y, labels, scale, EqualKeys(keys, keys), 0)
        assert gap.min() >= -1e-12
        gaps.append(gap.max().item())
    assert gaps[0] > 0.1
    assert gaps[1] < 1e-3
