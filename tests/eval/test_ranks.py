"""Ranks in tiles against their definition, one pair at a time; ties and what is no number count against the model."""

import math

import pytest
import torch
from torch import Tensor

from eval.ranks import NO_GROUP, Matches, find_matches, find_matches_shared
from tests.ranks import run_ranks
from vlm.distributed.world import World


def problem(
    num_queries: int = 23, num_candidates: int = 41, num_groups: int = 9
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    queries = torch.nn.functional.normalize(torch.randn(num_queries, 6, generator=draw), dim=1)
    candidates = torch.nn.functional.normalize(torch.randn(num_candidates, 6, generator=draw), dim=1)
    candidates[7] = candidates[3]  # a tie between candidates
    query_groups = torch.randint(num_groups, (num_queries, 3), generator=draw)  # now and then the same group twice
    query_groups[torch.rand(num_queries, generator=draw) < 0.6, 1:] = NO_GROUP  # most are in one group only
    candidate_groups = torch.arange(num_candidates)[:, None] % num_groups
    return queries, candidates, query_groups, candidate_groups


def brute_force(queries: Tensor, candidates: Tensor, query_groups: Tensor, candidate_groups: Tensor) -> list[int]:
    ranks = []
    others = [set(row) for row in candidate_groups.tolist()]
    for query, groups in zip(queries.double().tolist(), query_groups.tolist(), strict=True):
        scores = [math.fsum(a * b for a, b in zip(query, row, strict=True)) for row in candidates.double().tolist()]
        wanted = set(groups) - {NO_GROUP}
        own = [score for score, other in zip(scores, others, strict=True) if other & wanted]
        rivals = [score for score, other in zip(scores, others, strict=True) if not other & wanted]
        ranks.append(1 + sum(score >= max(own) for score in rivals))
    return ranks


@pytest.mark.parametrize("tile", [1, 2, 7, 16, 1000])
def test_ranks_and_scores_equal_their_definition_in_any_tiling(tile: int) -> None:
    expected = brute_force(*problem())
    assert len(set(expected)) > 5
    found = find_matches_shared(*problem(), World(), tile)
    assert found.ranks.tolist() == expected
    queries, candidates, query_groups, candidate_groups = problem()
    for row, best in enumerate(found.scores.tolist()):
        right = torch.isin(candidate_groups[:, 0], query_groups[row])
        own = candidates[right].double() @ queries[row].double()
        assert best == pytest.approx(float(own.max()), abs=1e-7)


def on_this_rank(tile: int) -> Matches:
    return find_matches_shared(*problem(), World.current(), tile)


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gets_the_same_integers(world_size: int) -> None:
    for found in run_ranks(on_this_rank, world_size, 4):
        assert found.ranks.tolist() == brute_force(*problem())


def test_a_tie_counts_against_the_model_and_own_candidates_do_not() -> None:
    query = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.9, 0.0], [1.0, 0.0]])
    groups = torch.tensor([[4], [5], [6], [4]])  # two of its own, one tie, one worse
    assert find_matches(query, candidates, torch.tensor([[4]]), groups).ranks.tolist() == [2]
    assert find_matches(query, candidates, torch.tensor([[6]]), groups).ranks.tolist() == [4]


@pytest.mark.parametrize("value", [0.37, math.nan])
def test_one_point_for_everything_comes_last_everywhere(value: float) -> None:
    queries, candidates, query_groups, candidate_groups = problem()
    own = [int(torch.isin(candidate_groups[:, 0], groups).sum()) for groups in query_groups]
    found = find_matches(
        torch.full_like(queries, value), torch.full_like(candidates, value), query_groups, candidate_groups, 3
    )
    assert found.ranks.tolist() == [1 + len(candidates) - count for count in own]


def test_equal_embeddings_tie_wherever_they_stand() -> None:
    draw = torch.Generator().manual_seed(0)
    row = torch.nn.functional.normalize(torch.randn(1, 513, generator=draw), dim=1)
    candidates = row.repeat(1001, 1)
    for tile in (1, 64, 100, 1001):
        found = find_matches(row.repeat(5, 1), candidates, torch.arange(5)[:, None], torch.arange(1001)[:, None], tile)
        assert found.ranks.tolist() == [1001] * 5


def test_reduced_precision_of_the_model_does_not_reach_the_scores() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert find_matches(*problem()).ranks.tolist() == brute_force(*problem())
