"""Ranks of the right candidates among all, tile by tile, shared by the ranks of the world.

Scores are summed in float64 and rounded to fp32. So equal embeddings score equally wherever they stand in a tile, and
the resulting integers do not depend on how the matrix was cut.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from vlm.distributed.world import World

TILE = 1024
NO_GROUP = -1


class Matches(NamedTuple):
    """The rank of each query's best right candidate (1 is best), and its score."""

    ranks: Int64[Tensor, " queries"]
    scores: Float32[Tensor, " queries"]


def find_matches(
    queries: Float32[Tensor, "queries dim"],
    candidates: Float32[Tensor, "candidates dim"],
    query_groups: Int64[Tensor, "queries groups"],
    candidate_groups: Int64[Tensor, "candidates some"],
    tile: int = TILE,
) -> Matches:
    """The rank of each query's best right candidate, found with `queries x tile` scores at a time.

        rank[q] = 1 + #{wrong c: not score[q, c] < best[q]},  best[q] = max score[q, c] over right c

    A candidate is right when it is in one of the query's groups; rows in fewer groups than others are filled up with
    NO_GROUP. Wrong candidates that tie count as better, and so do scores that are no number: a model that maps
    everything to one point, or to NaN, comes last everywhere. Further right candidates are not in a query's way.
    """
    best = queries.new_full((len(queries),), float("-inf"))
    ranks = torch.ones(len(queries), dtype=torch.int64, device=queries.device)
    tiles = range(0, len(candidates), tile)
    for start in tiles:
        is_right = in_common_group(query_groups, candidate_groups[start : start + tile])
        if is_right.any():
            scores = score(queries, candidates[start : start + tile])
            best = best.maximum(scores.masked_fill(~is_right, float("-inf")).amax(dim=1))
    for start in tiles:
        is_right = in_common_group(query_groups, candidate_groups[start : start + tile])
        scores = score(queries, candidates[start : start + tile])
        ranks += (~(scores < best[:, None]) & ~is_right).sum(dim=1)
    return Matches(ranks, best)


def find_matches_shared(
    queries: Float32[Tensor, "queries dim"],
    candidates: Float32[Tensor, "candidates dim"],
    query_groups: Int64[Tensor, "queries groups"],
    candidate_groups: Int64[Tensor, "candidates some"],
    world: World,
    tile: int = TILE,
) -> Matches:
    """`find_matches` of all queries on every rank, the tiles of queries taken in turn by the ranks. Collective."""
    ranks = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    scores = queries.new_zeros(len(queries))
    for start in range(world.rank * tile, len(queries), world.size * tile):
        rows = slice(start, start + tile)
        ranks[rows], scores[rows] = find_matches(queries[rows], candidates, query_groups[rows], candidate_groups, tile)
    return Matches(world.sum(ranks), world.sum(scores))


def score(
    queries: Float32[Tensor, "queries dim"], candidates: Float32[Tensor, "candidates dim"]
) -> Float32[Tensor, "queries candidates"]:
    """Inner products; autocast leaves float64 alone."""
    return (queries.double() @ candidates.double().T).float()


def in_common_group(
    query_groups: Int64[Tensor, "queries groups"], candidate_groups: Int64[Tensor, "candidates some"]
) -> Bool[Tensor, "queries candidates"]:
    """Whether a query and a candidate are in a group together."""
    common = torch.zeros(len(query_groups), len(candidate_groups), dtype=torch.bool, device=query_groups.device)
    for groups in query_groups.T:
        rows = (groups != NO_GROUP).nonzero().flatten()
        for others in candidate_groups.T:
            if len(rows) == len(groups):
                common |= groups[:, None] == others
            elif len(rows):
                common[rows] |= groups[rows, None] == others
    return common
