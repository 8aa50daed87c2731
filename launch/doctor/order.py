"""The order of samples on the launched ranks: batch, lanes and shards, and that the ranks see the same."""

import hashlib
import json
from collections.abc import Iterable

import numpy as np

from data.order.order import Order, SourceCounts
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.patterns import expand_shards
from launch.doctor.check import CHECKS, Check, Place
from launch.findings import Finding
from launch.recipe import Recipe
from vlm.distributed.world import World
from vlm.errors import UserError

_ALIKE = "the same recipe, data and options on every machine"


@CHECKS.register("order")
class SampleOrder(Check):
    """Which samples the ranks would take at the first step, and whether all plan alike. Collective."""

    needs_recipe = True

    def findings(self, place: Place) -> Iterable[Finding]:  # noqa: D102
        found, digest, problem = None, "", None
        try:
            if place.needed.data.mode == "indexed":
                found, digest = first_picks(place.needed, place.world)
        except (UserError, ValueError) as error:
            problem = Finding("order", "fail", str(error), "global_batch, data.lanes, or the sources' shares")
        digests = place.world.gather_objects(digest)
        if problem is not None:
            return [problem]
        if other := [rank for rank, one in enumerate(digests) if one != digests[0]]:
            words = f"rank {other[0]} would take other samples than rank 0 ({len(other):,} ranks differ)"
            return [Finding("order", "fail", words, _ALIKE)]
        if found is None:
            return [Finding("order", "ok", "nothing to compare without an index")]
        return [Finding("order", "ok", f"{found:,} pairs of the first batch on rank {place.world.rank}")]


def first_picks(recipe: Recipe, world: World) -> tuple[int | None, str]:
    """How many samples of the first batch this rank takes, and a digest of what decides about all of them.

    None where an index is missing. Raises UserError or ValueError for numbers that do not go together.
    """
    cache, counts = ShardCache(recipe.data.cache, recipe.data.retry), {}
    for name, source in recipe.data.sources.items():
        where = f"data.sources.{name}.shards"
        shards = expand_shards(source.patterns, recipe.data.root, where)
        known = FolderIndex(cache, where).known(shards)
        if len(known) < len(shards):
            return None, ""
        counts[name] = [known[shard].samples for shard in shards]
    weights = recipe.data.weights({name: sum(of_shards) for name, of_shards in counts.items()})
    sources = [SourceCounts(name, of_shards, weights[name]) for name, of_shards in counts.items()]
    order = Order(recipe.seed, sources, recipe.global_batch, lanes=recipe.data.lanes, window=recipe.data.shuffle_shards)
    first, last = (rank * recipe.global_batch // world.size for rank in (world.rank, world.rank + 1))
    picks = order.picks(0, range(first, last))
    assert bool((np.diff([first, last]) == len(picks.rows)).all())
    decides = [recipe.seed, recipe.global_batch, order.lanes, recipe.data.shuffle_shards, weights, counts]
    return len(picks.rows), hashlib.sha256(json.dumps(decides).encode()).hexdigest()
