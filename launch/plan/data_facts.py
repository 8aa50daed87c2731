"""What is known of a recipe's data without reading it: by the manifests of its folders, or by what the user says."""

from dataclasses import dataclass

from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.patterns import expand_shards
from data.shards.store import is_remote
from launch.recipe import Recipe
from vlm.errors import UserError


@dataclass(frozen=True)
class SourceFacts:
    """A source's shards, its samples and bytes where manifests know them of all, and why there is nothing to know."""

    name: str
    shards: int = 0
    samples: int | None = None
    bytes: int | None = None
    remote: bool = False
    problem: str = ""


def facts_of(recipe: Recipe) -> list[SourceFacts]:
    """The facts on each source of a recipe; what cannot be reached is a problem in words."""
    cache = ShardCache(recipe.data.cache, recipe.data.retry)
    return [_facts(recipe, name, cache) for name in recipe.data.sources]


def num_samples(facts: list[SourceFacts]) -> int | None:
    """The samples of all sources; None where one of them is not known."""
    counts = [one.samples for one in facts]
    return None if None in counts else sum(count for count in counts if count is not None)


def _facts(recipe: Recipe, name: str, cache: ShardCache) -> SourceFacts:
    where, source = f"data.sources.{name}.shards", recipe.data.sources[name]
    try:
        shards = expand_shards(source.patterns, recipe.data.root, where)
        if recipe.data.mode == "sequential":
            return SourceFacts(name, len(shards), source.num_samples, remote=is_remote(shards[0]))
        entries = FolderIndex(cache, where).known(shards)
    except UserError as error:
        return SourceFacts(name, problem=str(error))
    remote = is_remote(shards[0])
    if len(entries) < len(shards):
        missing = f"{len(shards) - len(entries):,} of {len(shards):,} shards have no index"
        return SourceFacts(name, len(shards), remote=remote, problem=missing)
    texts_alone = 0 if recipe.data.images else sum(entry.imageless or 0 for entry in entries.values())
    samples = sum(entry.samples for entry in entries.values()) + texts_alone
    return SourceFacts(name, len(shards), samples, sum(entry.bytes or 0 for entry in entries.values()), remote)
