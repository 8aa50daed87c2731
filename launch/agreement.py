"""What all ranks of a run have alike, or else it does not begin: recipe, options, and the data that they see."""

from collections.abc import Mapping, Sequence

from data.summary import SourceSummary
from launch.recipe import Recipe, keys_that_part_ranks
from vlm.errors import EveryRankError
from vlm.training.data_record import differences
from vlm.world import World

_SHOWN = 3


def require_same_start(world: World, recipe: Recipe, options: Mapping[str, str | bool | None]) -> None:
    """Compare what each rank was started with; where its data lies, and how it is read, may differ. Collective.

    Raises:
        EveryRankError: a rank has another recipe (another copy of the file, other overrides) or other options.
    """
    mine = {**recipe.model_dump(mode="json"), **options}
    first, *others = world.gather_objects(mine)
    for rank, other in enumerate(others, start=1):
        keys = keys_that_part_ranks(first, other)
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            raise EveryRankError(
                f"rank {rank} was started with other values than rank 0 of {', '.join(keys[:_SHOWN])}{more}; "
                "all ranks need the same recipe and options"
            )


def require_same_sources(world: World, sources: Sequence[SourceSummary]) -> None:
    """Compare the training data that the ranks see, where each machine has a copy of its own. Collective.

    Raises:
        EveryRankError: a rank sees other data than rank 0.
    """
    shards = {source.name: source.shards for source in sources}
    first, *others = world.gather_objects({source.name: source.record for source in sources})
    for rank, other in enumerate(others, start=1):
        for name, record in first.items():
            if differences({name: record}, {name: other[name]}, shards) is not None:
                raise EveryRankError(
                    f"data.sources.{name}: rank {rank} sees {other[name].samples:,} samples in {other[name].shards} "
                    f"shards, rank 0 sees {record.samples:,} in {record.shards}, and not the same: "
                    "every machine needs the same data"
                )
